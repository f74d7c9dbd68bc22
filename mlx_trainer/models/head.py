"""Head and loss over the positions that predict a trained token, in parts: the logits never exist all at once."""

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

    In eval mode `token_accuracy` is counted too. With a frozen head, loss and gradient of each part are computed in one
    go, and only the gradient with respect to the states is kept, (predictions, hidden).
    """
    head, module = head_of(model)
    targets, weights, size = batch.targets, batch.weights, part_size(vocabulary)
    parts = [slice(begin, begin + size) for begin in range(0, len(targets), size)]

    def losses_of(states: mx.array, part: slice) -> mx.array:
        return cross_entropy(head(states), targets[part])

    frozen = not tree_flatten(module.trainable_parameters())
    if model.training and frozen:
        return LossOutput(with_gradient(losses_of, parts, weights, states), weights.sum())
    losses = mx.stack([(losses_of(states[part], part) * weights[part]).sum() for part in parts]).sum()
    metrics = {}
    if not model.training:
        right = [(mx.argmax(head(states[part]), axis=-1) == targets[part]) * weights[part] for part in parts]
        metrics["token_accuracy"] = mx.concatenate(right).sum()
    return LossOutput(losses, weights.sum(), metrics)


def with_gradient(
    losses_of: Callable[[mx.array, slice], mx.array], parts: list[slice], weights: mx.array, states: mx.array
) -> mx.array:
    """The sum of `losses_of` · weights over `parts`; its gradient is computed with it and kept instead of logits."""

    @mx.custom_function
    def loss(states: mx.array) -> tuple[mx.array, mx.array]:
        losses, gradients = [], []
        for part in parts:
            each, gradient = mx.vjp(lambda x, part=part: losses_of(x, part), [states[part]], [weights[part]])
            losses.append((each[0] * weights[part]).sum())
            gradients += gradient
        return mx.stack(losses).sum(), mx.concatenate(gradients)

    @loss.vjp
    def loss_vjp(states: Any, cotangents: Any, outputs: Any) -> Any:
        _, kept = outputs
        return cast(cast(kept, mx.float32) * spread(cotangents[0], kept), kept.dtype)

    value: mx.array = loss(states)[0]  # type: ignore[index]  # its stub says that it returns an object
    return value


def part_size(vocabulary: int) -> int:
    """Predictions of which the logits are computed at once."""
    return max(LOGITS_AT_ONCE // vocabulary, 16)
