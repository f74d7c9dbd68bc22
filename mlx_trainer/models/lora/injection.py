"""Putting adapters into a model, and what trains afterwards."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora.initialisation import start
from mlx_trainer.models.lora.layers import (
    ADAPTER_NAMES,
    MAGNITUDE,
    DoRALinear,
    LoRALinear,
    dimensions,
    is_switch,
    trainable,
    uniform,
)
from mlx_trainer.models.lora.targets import EMBEDDINGS, chosen_layers
from mlx_trainer.models.quantized import dequantize_at_use
from mlx_trainer.state import preserved_random_state


def inject_lora(model: nn.Module, lora: LoRAConfig, *, seed: int = 0) -> nn.Module:
    """Freeze `model`, put adapters on the layers that `lora` chooses, and return it.

    Packed layers, being frozen, then compute what is faster for training (`quantized.py`). The adapters' start is a
    function of `seed`, the names of the layers and their weights. Raises ModelError where `lora` names what the model
    does not have, or something else than the adapters would train.
    """
    layers = chosen_layers(model, lora)
    keys = mx.random.split(mx.random.key(seed), len(layers))
    adapted = {path: adapter(path, layer, lora, key) for (path, layer), key in zip(layers.items(), keys, strict=True)}
    model.freeze()
    dequantize_at_use(model)
    model.update_modules(tree_unflatten(list(adapted.items())))
    for layer in adapted.values():
        layer.train(model.training)
    check_only_adapters_train(model, adapted)
    return model


def adapter(path: str, layer: Any, lora: LoRAConfig, key: mx.array) -> Any:
    """Return the adapted layer for `layer` at `path`; raises ModelError for what its kind cannot be."""
    options = {"dropout": lora.dropout, "scale": lora.scale_of(path)}
    if isinstance(layer, EMBEDDINGS) or is_switch(layer):
        refuse(path, {"use_dora": lora.use_dora, "init_lora_weights": lora.init_lora_weights != "default"})
        return mlx_lm_adapter(layer, key, r=lora.rank_of(path), **options)
    kind = DoRALinear if lora.use_dora else LoRALinear
    adapted = kind(layer, key=key, rank=lora.rank_of(path), **options)
    if lora.init_lora_weights != "default":
        start(adapted, lora.init_lora_weights, key)
    return adapted


def refuse(path: str, options: Mapping[str, bool]) -> None:
    """Raise ModelError for the first of `options` that is set."""
    for name, given in options.items():
        if given:
            raise ModelError(
                f"lora.{name} is for linear layers, and {path} is an embedding or a layer of experts; "
                f"name other lora.target_modules, or leave lora.{name} at its default."
            )


def mlx_lm_adapter(layer: Any, key: mx.array, **options: Any) -> Any:
    """Return mlx-lm's adapter on an embedding, or on the linear layer of several experts, started from `key`."""
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

    kind: Any = LoRASwitchLinear if is_switch(layer) else LoRAEmbedding
    with preserved_random_state():
        adapted = kind.from_base(layer, **options)
    inputs, rows = dimensions(layer)
    adapted.lora_a = uniform(adapted.lora_a.shape, inputs if is_switch(layer) else rows, key)
    return adapted


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


def check_only_adapters_train(model: nn.Module, adapted: Mapping[str, nn.Module]) -> None:
    """Raise ModelError unless the trainable parameters are exactly the adapters of the layers at their paths."""
    names = {
        path: (*ADAPTER_NAMES, MAGNITUDE) if MAGNITUDE in layer else ADAPTER_NAMES for path, layer in adapted.items()
    }
    expected = {f"{path}.{name}" for path, own in names.items() for name in own}
    if wrong := sorted(expected ^ set(trainable(model))):
        raise ModelError(f"Exactly the adapters should train; wrong are {', '.join(wrong[:5])} ({len(wrong)} in all).")
