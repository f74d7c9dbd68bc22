"""Several layers of one input, adapted or not, computed together where that is known to be the same."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_trainer.models.lora.adalora import AdaLoRALinear
from mlx_trainer.models.lora.layers import DoRALinear, LoRALinear, base_of, dropout_of, factors
from mlx_trainer.models.products import Adapter, Make, kept, products
from mlx_trainer.models.quantized import QuantizedLinear

ADAPTED = (LoRALinear, DoRALinear, AdaLoRALinear)


def project(
    x: mx.array | Sequence[mx.array],
    *layers: nn.Module,
    keys: Sequence[mx.array | None] | None = None,
    make: Make = lambda x: x,
) -> tuple[mx.array, ...]:
    """What each of `layers`, adapted or not, makes of the same `make(x)` (positions, in), or `make(*x)`.

    Frozen linear layers, and `LoRALinear`s and `DoRALinear`s on them, are computed together (`products.py`), any other
    on its own. With the `keys` of `dropout_keys`, dropout is the same each time; without, the keys are drawn here.
    `make` costs little and trains nothing: those computed together run it again for the gradient, and keep x instead of
    its result.
    """
    inputs = [x] if isinstance(x, mx.array) else list(x)
    together = [i for i, layer in enumerate(layers) if shares_input(layer)]
    if len(together) < len(layers):
        inputs, make = [make(*inputs)], lambda x: x
    if not together:
        return tuple(layer(*inputs) for layer in layers)
    keys = dropout_keys(*layers) if keys is None else keys
    together.sort(key=lambda i: type(layers[i]) not in ADAPTED)  # the adapted ones first
    adapters = [adapter_of(layers[i], keys[i], inputs[0]) for i in together if type(layers[i]) in ADAPTED]
    computed = products(inputs, make, [base_of(layers[i]) for i in together], adapters)
    shared = dict(zip(together, computed, strict=True))
    return tuple(rescaled(layer, shared[i]) if i in shared else layer(*inputs) for i, layer in enumerate(layers))


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
    own = type(layer) in ADAPTED
    base: Any = base_of(layer) if own else layer
    known = type(base) in (nn.Linear, nn.QuantizedLinear, QuantizedLinear)
    plain_dropout = not own or type(layer.dropout) is nn.Dropout
    return known and plain_dropout and not tree_flatten(base.trainable_parameters())


def rescaled(layer: Any, y: mx.array) -> mx.array:
    """`y` of `layer` with its magnitudes, where it has any."""
    return layer.rescaled(y) if type(layer) is DoRALinear else y


def adapter_of(layer: Any, key: mx.array | None, x: mx.array) -> Adapter:
    """The adapter of `layer`, with dropout of `x` drawn from `key`."""
    a, b = factors(layer)
    if key is None:
        return Adapter(a, b, layer.scale)
    # Without the dependency a compiled step would merge equal draws, and keep the mask of what is computed again.
    mask, share = kept(x.shape, dropout_of(layer), mx.depends(key, mx.stop_gradient(x)))
    return Adapter(a, b, layer.scale / share, mask)
