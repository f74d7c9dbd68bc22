"""Putting adapters into a model, and what trains afterwards."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora.layers import ADAPTER_NAMES, LoRALinear, trainable
from mlx_trainer.models.lora.targets import linear_layers, target_paths
from mlx_trainer.models.quantized import dequantize_at_use


def inject_lora(model: nn.Module, lora: LoRAConfig, *, seed: int = 0) -> nn.Module:
    """Freeze `model`, put adapters on the layers that `lora.target_modules` name, and return it.

    Packed layers, being frozen, then compute what is faster for training (`quantized.py`). The adapters' start is a
    function of `seed` and the names of the layers alone. Raises ModelError where a name matches no layer, or something
    else than the adapters would train.
    """
    layers = linear_layers(model)
    paths = target_paths(list(layers), lora.target_modules)
    adapted = [
        (path, LoRALinear(layers[path], rank=lora.rank, scale=lora.alpha / lora.rank, dropout=lora.dropout, key=key))
        for path, key in zip(paths, mx.random.split(mx.random.key(seed), len(paths)), strict=True)
    ]
    model.freeze()
    dequantize_at_use(model)
    model.update_modules(tree_unflatten(adapted))
    for _, layer in adapted:
        layer.train(model.training)
    check_only_adapters_train(model, paths)
    return model


def unfreeze(model: nn.Module) -> nn.Module:
    """Let every parameter of `model` train, and return it; raises ModelError where packed weights cannot."""
    model.unfreeze()
    packed = [path for path, module in model.named_modules() if hasattr(module, "bits")]
    if packed:
        raise ModelError(
            f"Full fine-tuning (lora=None) cannot train packed weights such as {packed[-1]}; "
            "use LoRA on the quantized model, or a model that is not quantized."
        )
    return model


def check_only_adapters_train(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise ModelError unless the trainable parameters are exactly the adapters on `paths`."""
    expected = {f"{path}.{name}" for path in paths for name in ADAPTER_NAMES}
    if wrong := sorted(expected ^ set(trainable(model))):
        raise ModelError(f"Exactly the adapters should train; wrong are {', '.join(wrong[:5])} ({len(wrong)} in all).")
