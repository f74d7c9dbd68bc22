"""Training the last blocks of a model alone, in full or by adapters: all before and after them stays frozen."""

import re
from collections.abc import Iterable

import mlx.nn as nn
from attrs import evolve
from mlx.utils import tree_flatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora import unfreeze


def unfreeze_last(model: nn.Module, count: int | None = None) -> nn.Module:
    """Let all of `model` train, or the last `count` blocks and nothing else, and return it.

    As mlx-lm's `num_layers` with `fine_tune_type: full`: embedding, final norm and head stay frozen. The backward pass
    ends at the first block that trains, and gradients and optimizer state exist for these blocks alone. Raises
    ModelError where there are fewer blocks, or where their weights are packed.
    """
    if count is None:
        return unfreeze(model)
    model.freeze()
    for block in last_blocks(model, count):
        unfreeze(block)
    return model


def on_last(model: nn.Module, lora: LoRAConfig, count: int | None) -> LoRAConfig:
    """Return `lora` for the last `count` blocks of `model`, by their `layers_to_transform`; raises as the others do."""
    if count is None:
        return lora
    first = len(model.layers) - len(last_blocks(model, count))
    return evolve(lora, layers_to_transform=tuple(range(first, len(model.layers))))


def last_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """The last `count` blocks of `model`; raises ModelError where there are fewer."""
    blocks: list[nn.Module] = model.layers
    if not 1 <= count <= len(blocks):
        raise ModelError(f"trainable_layers is {count}; this model has {len(blocks)} layers, so it is 1 to that.")
    return blocks[-count:]


def trained_blocks(model: nn.Module) -> int:
    """How many blocks of `model` have something that trains."""
    return sum(bool(tree_flatten(block.trainable_parameters())) for block in model.layers)


def blocks_named(names: Iterable[str]) -> int | None:
    """How many blocks these parameters belong to; None where one belongs to none, as in a whole model.

    >>> blocks_named(["model.layers.2.mlp.up_proj.weight", "model.layers.3.input_layernorm.weight"])
    2
    """
    numbers = [match[1] if (match := re.search(r"\.(\d+)\.", name)) else None for name in names]
    return None if None in numbers else len(set(numbers))
