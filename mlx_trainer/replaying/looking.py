"""The loss of each row of a step, and the gradient of each layer, with its parameters and its dropout."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_trainer.data import BatchLoader, render
from mlx_trainer.data.batches.alone import alone
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import CausalLMModule
from mlx_trainer.monitoring import mask_secrets
from mlx_trainer.replaying.step import ReplayedRow
from mlx_trainer.state import preserved_random_state
from mlx_trainer.step import Sums, as_sums, global_norm
from mlx_trainer.traced import Gradients, from_tree, number, to_tree

Batches = Sequence[tuple[Any, Sequence[TokenRow]]]
"""Micro-batches, each with its rows."""


def batches_of(loader: BatchLoader, epoch: int, position: int, accumulate: int) -> Batches:
    """The micro-batches of the step that begins at `position`."""
    end = min(position + accumulate, len(loader))
    planned = [loader.plan(epoch)[place] for place in range(position, end)]
    return [(loader.batch(epoch, each), loader.rows_of(epoch, each)) for each in planned]


def look(module: CausalLMModule, batches: Batches) -> tuple[tuple[ReplayedRow, ...], dict[str, float]]:
    """The rows, and the norm of each layer's gradient, from the parameters and the random state that there are."""
    rows: list[ReplayedRow] = []
    gradients: Gradients = tree_map(lambda parameter: mx.zeros(parameter.shape), module.model.trainable_parameters())
    weight = mx.array(0.0)
    module.model.train()
    for batch, of in batches:
        rows += [row_alone(module, batch, of, place) for place in range(len(of))]
        (_, own, _), new = nn.value_and_grad(module.model, lambda _, b=batch: sums(module, b))(module.model)
        gradients = tree_map(lambda total, g: total + g.astype(mx.float32), gradients, new)
        weight += own
        mx.eval(gradients, weight, mx.random.state)
    return tuple(rows), norms_by_layer(tree_map(lambda g: g / weight, gradients))


def sums(module: CausalLMModule, batch: Any) -> Sums:
    """The loss of a batch as a tree."""
    return as_sums(module.training_loss(from_tree(to_tree(batch))))


def row_alone(module: CausalLMModule, batch: Any, rows: Sequence[TokenRow], place: int) -> ReplayedRow:
    """What one row adds to the loss of its batch; leaves the random state as it was."""
    with preserved_random_state():
        total, weight, _ = sums(module, alone(batch, rows, place))
        loss = number(total) / number(weight)
    row = rows[place]
    return ReplayedRow(row.source, loss, row.trained_tokens, render(row, module.tokenizer).changed(mask_secrets))


def norms_by_layer(gradients: Any) -> dict[str, float]:
    """The norm of each layer's gradients, by names such as `layers.3`; what is in no layer by its own path."""
    groups: dict[str, list[mx.array]] = defaultdict(list)
    for name, gradient in dict(tree_flatten(gradients)).items():
        layer = re.search(r"layers\.\d+", name)
        groups[layer[0] if layer else name.rpartition(".")[0]].append(gradient)
    return {name: number(global_norm(group)) for name, group in groups.items()}
