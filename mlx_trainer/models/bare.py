"""The base model behind its adapters, without a second copy of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_trainer.models.lora import adapted_layers, base_of


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes what its base does, bit for bit: the layers below the adapters stand in their place.

    A scale of 0 would not be that: it adds zeros, which turns -0 into 0, and NaN where an adapter overflows. Costs a
    walk over the modules; a function that `mx.compile` has traced does not see it.
    """
    adapted = adapted_layers(model)
    model.update_modules(tree_unflatten([(path, base_of(layer)) for path, layer in adapted.items()]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(adapted.items())))
