"""The next-token loss, as sums over the positions that have a label."""

from typing import Any

import mlx.core as mx

from mlx_trainer import runtime
from mlx_trainer.models.exponential import exp
from mlx_trainer.module import LossOutput

IGNORED = -100
"""Hugging Face's label for a position that is not trained."""


def next_token_loss(logits: mx.array, labels: mx.array, *, accuracy: bool = False) -> LossOutput:
    """Return the cross-entropy of predicting each labelled token from those before it, summed in float32.

    `logits` is (rows, length, vocabulary); `labels` is (rows, length), aligned with the inputs and shifted here.
    `accuracy` adds the number of right first guesses, at the price of an argmax over the vocabulary.
    """
    targets = next_tokens(labels)
    counted = targets != IGNORED
    targets = mx.where(counted, targets, 0)
    losses = cross_entropy(logits, targets)
    metrics = {}
    if accuracy:
        metrics["token_accuracy"] = total(counted & (mx.argmax(logits, axis=-1) == targets))
    return LossOutput(total=mx.where(counted, losses, 0).sum(), weight=total(counted), metrics=metrics)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return log Σ exp(logits) - logits[target] in float32; logits (…, vocabulary), targets and result (…).

    On GPUs by MLX's own kernel.
    """
    if runtime.backend() != "cpu":
        return mx.fast.cross_entropy(logits, targets)
    return keeping_exponentials(logits, targets)


def keeping_exponentials(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the same; the gradient, softmax(logits) - onehot(target), uses the exponentials of the loss.

    It would else compute them again, and they are what a small model's step on a CPU spends most of its time with.
    """
    losses: mx.array = _cross_entropy(logits, targets)[0]  # type: ignore[index]
    return losses


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    scores = logits.astype(mx.float32)
    largest = scores.max(axis=-1, keepdims=True)
    powers = exp(scores - largest)
    sums = powers.sum(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(scores, targets[..., None], axis=-1)
    return (mx.log(sums) + largest - chosen)[..., 0], powers, sums


@_cross_entropy.vjp
def _cross_entropy_vjp(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    (logits, targets), (_, powers, sums), scale = primals, outputs, cotangents[0][..., None]
    gradient = powers * (scale / sums)
    at = targets[..., None]
    gradient = mx.put_along_axis(gradient, at, mx.take_along_axis(gradient, at, axis=-1) - scale, axis=-1)
    return gradient.astype(logits.dtype), mx.zeros_like(targets)


def next_tokens(labels: mx.array) -> mx.array:
    """Return the label that each position predicts, (rows, length): the labels one to the left, nothing at the end.

    The labels move, not the logits: slicing those would copy the largest array of the step.
    """
    return mx.concatenate([labels[:, 1:], mx.full((labels.shape[0], 1), IGNORED, labels.dtype)], axis=1)


def total(flags: mx.array) -> mx.array:
    """Return how many of `flags` hold, as a float32 scalar."""
    return flags.astype(mx.float32).sum()
