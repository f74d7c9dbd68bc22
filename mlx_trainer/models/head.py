"""Head and loss over the positions that predict a trained token, in parts: the logits never exist all at once."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_trainer.models.loss import IGNORED, cross_entropy, total
from mlx_trainer.module import LossOutput

LOGITS_AT_ONCE = 1 << 25
"""So many logits are computed at once: 128 MB in float32."""

Head = Callable[[mx.array], mx.array]


def head_of(model: Any) -> tuple[Head, nn.Module]:
    """What turns hidden states into logits, and the module whose weights it uses."""
    if "lm_head" in model:
        return model.lm_head, model.lm_head
    return model.model.embed_tokens.as_linear, model.model.embed_tokens


def head_loss(model: Any, states: mx.array, batch: Any, vocabulary: int) -> LossOutput:
    """The summed cross-entropy of `batch.targets` (predictions,), as predicted by the `states` (predictions, hidden).

    In eval mode `token_accuracy` is counted too.
    """
    losses = head_losses(model, states, batch.targets, vocabulary)
    counted, metrics = batch.targets != IGNORED, {}
    if not model.training:
        head, parts = head_of(model)[0], parts_of(batch.targets, vocabulary)
        right = [total(mx.argmax(head(states[part]), axis=-1) == batch.targets[part]) for part in parts]
        metrics["token_accuracy"] = mx.stack(right).sum()
    return LossOutput(losses.sum(), total(counted), metrics)


def head_losses(model: Any, states: mx.array, targets: mx.array, vocabulary: int) -> mx.array:
    """The cross-entropy of each of `targets` (predictions,) in float32, 0 where it is `IGNORED`.

    With a frozen head, loss and gradient of each part are computed in one go, and only the gradient with respect to the
    states is kept, (predictions, hidden).
    """
    head, module = head_of(model)
    counted = targets != IGNORED
    targets = mx.where(counted, targets, 0)
    parts = parts_of(targets, vocabulary)

    def part_losses(states: mx.array, part: slice) -> mx.array:
        return mx.where(counted[part], cross_entropy(head(states), targets[part]), 0)

    frozen = not tree_flatten(module.trainable_parameters())
    if model.training and frozen:
        return with_gradient(part_losses, parts, states)
    return mx.concatenate([part_losses(states[part], part) for part in parts])


def with_gradient(part_losses: Callable[[mx.array, slice], mx.array], parts: list[slice], states: mx.array) -> mx.array:
    """`part_losses` of all `parts`; the gradient is computed together with them and kept instead of logits.

    No loss depends on another's state, so each row of the gradient is one of them times what flows back into its loss.
    """

    @mx.custom_function
    def losses(states: mx.array) -> tuple[mx.array, mx.array]:
        values, gradients = [], []
        for part in parts:
            ones = [mx.ones(part.stop - part.start)]
            (value,), (gradient,) = mx.vjp(lambda x, part=part: part_losses(x, part), [states[part]], ones)
            values.append(value)
            gradients.append(gradient)
        return mx.concatenate(values), mx.concatenate(gradients)

    @losses.vjp
    def losses_vjp(states: Any, cotangents: Any, outputs: Any) -> Any:
        return (cotangents[0][:, None] * outputs[1]).astype(outputs[1].dtype)

    value: mx.array = losses(states)[0]  # type: ignore[index]  # its stub says that it returns an object
    return value


def parts_of(targets: mx.array, vocabulary: int) -> list[slice]:
    """The predictions in parts of which the logits are computed at once."""
    step, end = part_size(vocabulary), len(targets)
    return [slice(begin, min(begin + step, end)) for begin in range(0, end, step)]


def part_size(vocabulary: int) -> int:
    """Predictions of which the logits are computed at once."""
    return max(LOGITS_AT_ONCE // vocabulary, 16)
