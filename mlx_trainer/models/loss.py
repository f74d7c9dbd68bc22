"""The next-token loss, as sums over the positions that have a label."""

import mlx.core as mx
import mlx.nn as nn

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
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    metrics = {}
    if accuracy:
        metrics["token_accuracy"] = total(counted & (mx.argmax(logits, axis=-1) == targets))
    return LossOutput(total=mx.where(counted, losses, 0).sum(), weight=total(counted), metrics=metrics)


def next_tokens(labels: mx.array) -> mx.array:
    """Return the label that each position predicts, (rows, length): the labels one to the left, nothing at the end.

    The labels move, not the logits: slicing those would copy the largest array of the step.
    """
    return mx.concatenate([labels[:, 1:], mx.full((labels.shape[0], 1), IGNORED, labels.dtype)], axis=1)


def total(flags: mx.array) -> mx.array:
    """Return how many of `flags` hold, as a float32 scalar."""
    return flags.astype(mx.float32).sum()
