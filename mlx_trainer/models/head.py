"""Head and loss over the positions that predict a trained token, in parts.

With a frozen head the logits never exist all at once; one that trains keeps them for its gradient.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_trainer.fusion import cast, spread
from mlx_trainer.models.loss import cross_entropy
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
    """The summed cross-entropy of `batch.targets` by the `states` (predictions, hidden), by `batch.weights`.

    In eval mode `token_accuracy` is counted too.
    """
    losses, metrics = head_losses(model, states, batch, vocabulary), {}
    if not model.training:
        head, parts = head_of(model)[0], parts_of(batch.targets, vocabulary)
        right = [mx.argmax(head(states[part]), axis=-1) == batch.targets[part] for part in parts]
        metrics["token_accuracy"] = (mx.concatenate(right) * batch.weights).sum()
    return LossOutput(losses.sum(), batch.weights.sum(), metrics)


def head_losses(model: Any, states: mx.array, batch: Any, vocabulary: int) -> mx.array:
    """The cross-entropy of each of `batch.targets` times its weight, (predictions,), float32.

    With a frozen head, loss and gradient of each part are computed in one go, and only the gradient with respect to the
    states is kept, (predictions, hidden).
    """
    head, module = head_of(model)
    targets, weights, parts = batch.targets, batch.weights, parts_of(batch.targets, vocabulary)

    def losses_of(states: mx.array, part: slice) -> mx.array:
        return cross_entropy(head(states), targets[part])

    frozen = not tree_flatten(module.trainable_parameters())
    if model.training and frozen:
        return with_gradient(losses_of, parts, weights, states)
    losses: mx.array = mx.concatenate([losses_of(states[part], part) for part in parts]) * weights
    return losses


def with_gradient(
    losses_of: Callable[[mx.array, slice], mx.array], parts: list[slice], weights: mx.array, states: mx.array
) -> mx.array:
    """`losses_of` all parts times `weights`; the gradient is computed together with them and kept instead of logits.

    No loss depends on another's state, so each row of the gradient is one of them times what flows back into its loss.
    """

    @mx.custom_function
    def losses(states: mx.array) -> tuple[mx.array, mx.array]:
        values, gradients = [], []
        for part in parts:
            value, gradient = mx.vjp(lambda x, part=part: losses_of(x, part), [states[part]], [weights[part]])
            values += value
            gradients += gradient
        return mx.concatenate(values) * weights, mx.concatenate(gradients)

    @losses.vjp
    def losses_vjp(states: Any, cotangents: Any, outputs: Any) -> Any:
        _, kept = outputs
        return cast(cast(kept, mx.float32) * spread(cotangents[0][:, None], kept), kept.dtype)

    value: mx.array = losses(states)[0]  # type: ignore[index]  # its stub says that it returns an object
    return value


def parts_of(targets: mx.array, vocabulary: int) -> list[slice]:
    """The predictions in parts of which the logits are computed at once."""
    step, end = part_size(vocabulary), len(targets)
    return [slice(begin, min(begin + step, end)) for begin in range(0, end, step)]


def part_size(vocabulary: int) -> int:
    """Predictions of which the logits are computed at once."""
    return max(LOGITS_AT_ONCE // vocabulary, 16)
