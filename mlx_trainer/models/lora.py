"""LoRA: a low-rank adapter beside a frozen linear layer, and putting it on the layers that are named."""

import difflib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.products import Adapter, Make, kept, products
from mlx_trainer.models.quantized import QuantizedLinear, dequantize_at_use

Linear = nn.Linear | nn.QuantizedLinear
ADAPTER_NAMES = ("lora_a", "lora_b")


class LoRALinear(nn.Module):
    """`y = linear(x) + scale * (dropout(x) @ lora_a) @ lora_b`, x (..., in), y (..., out), in the type of x.

    The same names, start and function as mlx-lm's layer (https://arxiv.org/abs/2106.09685). The float32 adapters are
    cast at use; mlx-lm's layer turns all of a 16-bit x into float32 instead.
    """

    def __init__(self, linear: Linear, *, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        inputs, outputs = dimensions(linear)
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """Return `y` for `x`."""
        y = self.linear(x)
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return y + self.scale * (low @ self.lora_b.astype(x.dtype))


def project(
    x: mx.array | Sequence[mx.array],
    *layers: nn.Module,
    keys: Sequence[mx.array | None] | None = None,
    make: Make = lambda x: x,
) -> tuple[mx.array, ...]:
    """What each of `layers`, adapted or not, makes of the same `make(x)` (positions, in), or `make(*x)`.

    Frozen linear layers and `LoRALinear`s on them are computed together (`products.py`), any other on its own. With
    the `keys` of `dropout_keys`, their dropout is the same each time; without, the keys are drawn here. `make` costs
    little and trains nothing: those computed together run it again for the gradient, and keep x instead of its result.
    """
    inputs = [x] if isinstance(x, mx.array) else list(x)
    together = [i for i, layer in enumerate(layers) if shares_input(layer)]
    if len(together) < len(layers):
        inputs, make = [make(*inputs)], lambda x: x
    if not together:
        return tuple(layer(*inputs) for layer in layers)
    keys = dropout_keys(*layers) if keys is None else keys
    together.sort(key=lambda i: type(layers[i]) is not LoRALinear)  # the adapted ones first
    adapters = [adapter_of(layers[i], keys[i], inputs[0]) for i in together if type(layers[i]) is LoRALinear]
    computed = products(inputs, make, [base_of(layers[i]) for i in together], adapters)
    shared = dict(zip(together, computed, strict=True))
    return tuple(shared[i] if i in shared else layer(*inputs) for i, layer in enumerate(layers))


def dropout_keys(*layers: nn.Module) -> tuple[mx.array | None, ...]:
    """A key, (2,) of uint32, for each layer whose dropout `project` draws; None for one that drops nothing now.

    They come from MLX's random state, which stays as it is where all are None. A layer that `project` computes on its
    own draws for itself, and has None.
    """
    dropping = [shares_input(layer) and dropout_of(layer) > 0 for layer in layers]
    if not any(dropping):
        return (None,) * len(layers)
    drawn = mx.random.randint(0, 1 << 32, (len(layers), 2), dtype=mx.uint32)
    return tuple(key if drops else None for key, drops in zip(drawn, dropping, strict=True))


def shares_input(layer: nn.Module) -> bool:
    """Whether `project` knows what `layer` computes, by its exact class, and its weight is frozen."""
    base: Any = base_of(layer)
    known = type(base) in (nn.Linear, nn.QuantizedLinear, QuantizedLinear)
    plain_dropout = base is layer or type(layer.dropout) is nn.Dropout
    return known and plain_dropout and not tree_flatten(base.trainable_parameters())


def base_of(layer: Any) -> nn.Module:
    """The layer below an adapter of exactly our class, else the layer itself."""
    return layer.linear if type(layer) is LoRALinear else layer


def dropout_of(layer: Any) -> float:
    """The chance that `layer` drops an element of x now: 0 in eval mode and without an adapter."""
    dropout = layer.dropout if type(layer) is LoRALinear else None
    return 1 - dropout._p_1 if dropout is not None and dropout.training else 0.0


def adapter_of(layer: Any, key: mx.array | None, x: mx.array) -> Adapter:
    """The adapter of `layer`, with dropout of `x` drawn from `key`."""
    if key is None:
        return Adapter(layer.lora_a, layer.lora_b, layer.scale)
    # Without the dependency a compiled step would merge equal draws, and keep the mask of what is computed again.
    mask, share = kept(x.shape, dropout_of(layer), mx.depends(key, mx.stop_gradient(x)))
    return Adapter(layer.lora_a, layer.lora_b, layer.scale / share, mask)


def dimensions(linear: Linear) -> tuple[int, int]:
    """Return (in, out) of a linear layer; a packed weight holds 32 / bits values in each number."""
    outputs, inputs = linear.weight.shape
    return (inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs), outputs


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


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the linear layers of `model` by their dotted path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.QuantizedLinear))
    }


def target_paths(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the sorted `paths` whose last components are one of `targets`; raises ModelError for one that has none.

    >>> target_paths(["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"], ["self_attn.q_proj"])
    ['layers.0.self_attn.q_proj']
    """
    matches = {target: [path for path in paths if f".{path}".endswith(f".{target}")] for target in targets}
    unmatched = [target for target, matched in matches.items() if not matched]
    if unmatched or not targets:
        raise ModelError(unmatched_message(unmatched, sorted({path.rpartition(".")[2] for path in paths})))
    return sorted({path for matched in matches.values() for path in matched})


def unmatched_message(unmatched: Sequence[str], names: Sequence[str]) -> str:
    """Return the error's text for `unmatched` target modules where the linear layers are called `names`."""
    near = [match for target in unmatched for match in difflib.get_close_matches(target, names, n=1)]
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    wrong = f"no linear layer is called {', '.join(unmatched)}" if unmatched else "no layer was named"
    return f"lora.target_modules: {wrong}.{hint} This model's linear layers are {', '.join(names) or 'none'}."


def check_only_adapters_train(model: nn.Module, paths: Sequence[str]) -> None:
    """Raise ModelError unless the trainable parameters are exactly the adapters on `paths`."""
    expected = {f"{path}.{name}" for path in paths for name in ADAPTER_NAMES}
    if wrong := sorted(expected ^ set(trainable(model))):
        raise ModelError(f"Exactly the adapters should train; wrong are {', '.join(wrong[:5])} ({len(wrong)} in all).")


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters of `model` by their dotted name."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of `model` by their dotted path, sorted."""
    return {
        path: module
        for path, module in sorted(model.named_modules(), key=lambda item: item[0])
        if isinstance(module, LoRALinear)
    }
