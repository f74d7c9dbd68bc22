"""How likely a model finds each answer of a batch of pairs, and what the frozen base under its adapters finds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.utils import tree_unflatten

from mlx_trainer.eval_mode import eval_mode
from mlx_trainer.models.bare import without_adapters
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.head import head_losses
from mlx_trainer.models.lora import trainable
from mlx_trainer.models.loss import IGNORED, cross_entropy, next_tokens


@frozen
class Answers:
    """Log-probabilities of answers, summed over each one's `tokens`: both (answers,) and float32."""

    log_probabilities: mx.array
    tokens: mx.array

    @property
    def means(self) -> mx.array:
        """Mean log-probability of a token, (answers,); 0 where there is none."""
        return self.log_probabilities / mx.maximum(self.tokens, 1)

    def sides(self) -> tuple[Self, Self]:
        """The chosen and the rejected answers, (pairs,): in a batch they follow each other."""
        first, second = (Answers(self.log_probabilities[i::2], self.tokens[i::2]) for i in (0, 1))
        return first, second  # type: ignore[return-value]


def unpadded_answers(model: Any, states: mx.array, batch: Any, vocabulary: int) -> Answers:
    """The answers of an unpadded batch, of the `states` (predictions, hidden) that predict its targets.

    With a frozen head the logits of all predictions never exist at once, neither here nor for the gradient.
    """
    losses = head_losses(model, states, batch, vocabulary)
    rows, length = batch.grid.shape
    shared = batch.groups * batch.prefix
    # No token of a prefix predicts a trained one, so each that predicts has a cell, which tells its row.
    row = batch.cells[mx.maximum(batch.predicting - shared, 0)] // length
    # Summed as rows of a matrix, alike every time; a scatter would add in any order on a GPU.
    own = (row[None] == mx.arange(rows)[:, None]) & (batch.weights != 0)[None]
    return Answers(mx.where(own, -losses[None], 0).sum(axis=1), own.astype(mx.float32).sum(axis=1))


def padded_answers(logits: mx.array, labels: mx.array) -> Answers:
    """The answers of a padded batch: `logits` (rows, length, vocabulary), `labels` (rows, length)."""
    targets = next_tokens(labels)
    counted = targets != IGNORED
    losses = cross_entropy(logits, mx.where(counted, targets, 0))
    return Answers(mx.where(counted, -losses, 0).sum(axis=1), counted.astype(mx.float32).sum(axis=1))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """`without_adapters` in eval mode: `model` as its frozen base, which is the reference.

    It may be used while MLX traces. Raises ModelError where more than adapters trains, since then there is no base.
    """
    with eval_mode(model), without_adapters(model):
        if changed := sorted(trainable(model)):
            raise ModelError(
                f"The frozen base is the reference, but {changed[0]} trains beside the adapters ({len(changed)} "
                "such); train adapters alone, or use ORPO, which needs no reference."
            )
        yield


@contextmanager
def parameters_as(kept: Mapping[str, mx.array], model: nn.Module) -> Iterator[None]:
    """Inside, `model` has the parameters `kept` in place of its trained ones, and is in eval mode; also in a trace."""
    own = trainable(model)
    model.update(tree_unflatten(list(kept.items())))
    try:
        with eval_mode(model):
            yield
    finally:
        model.update(tree_unflatten(list(own.items())))
