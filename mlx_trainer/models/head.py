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

    In eval mode `token_accuracy` is counted too. With a frozen head, loss and gradient of each part are computed in one
    go, and only the gradient with respect to the states is kept, (predictions, hidden).
    """
    head, module = head_of(model)
    counted = batch.targets != IGNORED
    targets = mx.where(counted, batch.targets, 0)
    parts = [slice(begin, begin + step) for step in [part_size(vocabulary)] for begin in range(0, len(targets), step)]

    def part_loss(states: mx.array, part: slice) -> mx.array:
        return mx.where(counted[part], cross_entropy(head(states), targets[part]), 0).sum()

    frozen = not tree_flatten(module.trainable_parameters())
    if model.training and frozen:
        return LossOutput(with_gradient(part_loss, parts, states), total(counted))
    losses = mx.stack([part_loss(states[part], part) for part in parts]).sum()
    metrics = {}
    if not model.training:
        right = [total(counted[part] & (mx.argmax(head(states[part]), axis=-1) == targets[part])) for part in parts]
        metrics["token_accuracy"] = mx.stack(right).sum()
    return LossOutput(losses, total(counted), metrics)


def with_gradient(part_loss: Callable[[mx.array, slice], mx.array], parts: list[slice], states: mx.array) -> mx.array:
    """The sum of `part_loss` over `parts`; its gradient is computed together with it and kept instead of logits."""

    @mx.custom_function
    def loss(states: mx.array) -> tuple[mx.array, mx.array]:
        losses, gradients = [], []
        for part in parts:
            (value,), (gradient,) = mx.vjp(lambda x, part=part: part_loss(x, part), [states[part]], [mx.array(1.0)])
            losses.append(value)
            gradients.append(gradient)
        return mx.stack(losses).sum(), mx.concatenate(gradients)

    @loss.vjp
    def loss_vjp(states: Any, cotangents: Any, outputs: Any) -> Any:
        return (cotangents[0] * outputs[1]).astype(outputs[1].dtype)

    value: mx.array = loss(states)[0]  # type: ignore[index]  # its stub says that it returns an object
    return value


def part_size(vocabulary: int) -> int:
    """Predictions of which the logits are computed at once."""
    return max(LOGITS_AT_ONCE // vocabulary, 16)
