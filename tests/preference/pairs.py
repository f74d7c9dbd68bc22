"""Pairs of random tokens, and their losses written out: one row at a time, no batch, no padding, nothing shared."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.preference import PreferenceModule
from mlx_trainer.traced import from_tree, to_tree

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Sides = tuple[mx.array, mx.array]
"""Sum and mean of an answer's log-probabilities."""


def pairs_of(sizes: Sequence[tuple[int, int, int]], seed: int = 0) -> list[TokenRow]:
    """For each (prompt, chosen, rejected) two rows with the same prompt of so many tokens, and answers of so many."""
    random, rows = np.random.default_rng(seed), []
    for i, (prompt, *answers) in enumerate(sizes):
        asked = random.integers(10, 380, prompt)
        for side, length in zip(("chosen", "rejected"), answers, strict=True):
            ids = np.concatenate([asked, random.integers(10, 380, length)]).astype(np.int32)
            rows.append(TokenRow(f"x:{i} {side}", ids, np.arange(len(ids)) >= prompt, side))
    return rows


def shape_of(rows: Sequence[TokenRow], prefix: int = 0, spare: int = 0) -> Shape:
    """A shape that holds pairs which share so many tokens, with `spare` pairs and positions."""
    length = max(map(len, rows)) - prefix + spare
    count, own = len(rows) + 2 * spare, sum(len(row) - prefix for row in rows)
    groups = count // 2 if prefix else 0
    return Shape(count, length, groups * prefix + min(own + 1 + spare, count * length), prefix, groups)


def written_out(model: nn.Module, row: TokenRow) -> Sides:
    """Sum and mean of log p of the trained tokens of one row."""
    logits = model(mx.array(row.ids)[None])[0, :-1]
    likely = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(likely, mx.array(row.ids)[1:, None], axis=-1)[:, 0]
    trained = mx.array(row.trained[1:].astype(np.float32))
    return (chosen * trained).sum(), (chosen * trained).sum() / trained.sum()


def expected(
    module: PreferenceModule, base: nn.Module, rows: Sequence[TokenRow], loss: Callable[..., mx.array]
) -> tuple[float, dict[str, mx.array]]:
    """Loss sum and gradients of `loss(chosen, rejected, base's chosen, base's rejected)`, summed pair by pair."""

    def total(_: nn.Module) -> mx.array:
        losses = [
            loss(*(written_out(model, row) for model in (module.model, base) for row in pair))
            for pair in zip(rows[::2], rows[1::2], strict=True)
        ]
        return mx.stack(losses).sum()

    return differentiated(module, total)


def differentiated(
    module: PreferenceModule, total: Callable[[nn.Module], mx.array]
) -> tuple[float, dict[str, mx.array]]:
    """The value of `total`, and its gradients by name."""
    value, gradients = nn.value_and_grad(module.model, total)(module.model)
    return value.item(), dict(tree_flatten(gradients))


def sizes_before(module: PreferenceModule, rows: Sequence[TokenRow]) -> tuple[float, float]:
    """Of the log-probabilities that a loss subtracts from each other: their sum, and the largest gradient of it."""
    value, gradients = differentiated(
        module, lambda _: -mx.stack([written_out(module.model, r)[0] for r in rows]).sum()
    )
    return value, largest_of(gradients)


def found(module: PreferenceModule, batch: Any) -> tuple[float, float, dict[str, mx.array], dict[str, float]]:
    """Loss sum, weight, gradients and metrics of a batch."""
    traced = from_tree(to_tree(batch))

    def loss(_: nn.Module) -> tuple[mx.array, mx.array, Any]:
        output = module.training_loss(traced)
        return output.total, output.weight, dict(output.metrics)

    (value, weight, metrics), gradients = nn.value_and_grad(module.model, loss)(module.model)
    told = {name: each.item() for name, each in metrics.items()}
    return value.item(), weight.item(), dict(tree_flatten(gradients)), told


def assert_close(ours: dict[str, mx.array], plain: dict[str, mx.array], before: float) -> None:
    """Each gradient to 1e-5 of its parameter's largest, or to rounding: of the others where it is next to zero itself,
    and of those `before` they were subtracted, where a loss is next to its minimum.
    """
    assert ours.keys() == plain.keys() != set()
    rounding = 1e-6 * max(largest_of(plain), before)
    for name, value in plain.items():
        allowed = 1e-5 * mx.abs(value).max().item() + rounding
        assert mx.abs(ours[name] - value).max().item() <= allowed, name


def largest_of(gradients: dict[str, mx.array]) -> float:
    """The largest number of all."""
    return float(max(mx.abs(value).max().item() for value in gradients.values()))
