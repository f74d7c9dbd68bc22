"""The next-token loss against its formula, and what must not influence it."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_trainer.models.loss import IGNORED, cross_entropy, next_token_loss
from tests.models.batches import labelled


def logits_for(batch_shape: tuple[int, ...], vocabulary: int = 384, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Distinct logits."""
    values = np.random.default_rng(5).normal(size=(*batch_shape, vocabulary)).astype(np.float32)
    return mx.array(values).astype(dtype)


def by_hand(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int, int]:
    """Sum, number and right guesses of the labelled tokens, one position after the other in float64."""
    total, count, right = 0.0, 0, 0
    for row, column in np.argwhere(labels[:, 1:] != IGNORED):
        scores, target = logits[row, column].astype(np.float64), labels[row, column + 1]
        total += np.log(np.exp(scores).sum()) - scores[target]
        count, right = count + 1, right + int(scores.argmax() == target)
    return total, count, right


def test_it_equals_the_sum_by_hand() -> None:
    """Each labelled token is scored by the logits one to its left; sums, not means, and right guesses counted."""
    batch = labelled((9, 5, 7))
    logits = np.array(logits_for(batch.labels.shape))
    labels = np.array(batch.labels)
    logits[0, 4, labels[0, 5]] = logits[2, 3, labels[2, 4]] = 9.0  # two right guesses
    loss = next_token_loss(mx.array(logits), batch.labels, accuracy=True)
    total, count, right = by_hand(logits, labels)
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    assert (loss.weight.item(), loss.metrics["token_accuracy"].item()) == (count, right) == (12, 2)


def test_a_first_label_counts_nothing() -> None:
    """A label on the first position has nothing before it, so it is neither summed nor counted."""
    labels = mx.array([[5, IGNORED, IGNORED]])
    loss = next_token_loss(logits_for((1, 3)), labels)
    assert (loss.total.item(), loss.weight.item()) == (0.0, 0.0)


def test_positions_without_a_label_have_no_gradient() -> None:
    """The gradient of the logits is exactly 0 wherever the next token has no label."""
    batch = labelled((9, 5, 7))
    gradient = mx.grad(lambda logits: next_token_loss(logits, batch.labels).total)(logits_for(batch.labels.shape))
    moved = np.abs(np.array(gradient)).sum(axis=-1) > 0
    expected = np.zeros_like(moved)
    expected[:, :-1] = np.array(batch.labels)[:, 1:] != IGNORED
    assert np.array_equal(moved, expected)


def test_it_is_computed_in_float32() -> None:
    """Sums over float16 logits are float32 and as exact as those over the same numbers in float32."""
    batch = labelled((9, 5, 7))
    half = logits_for(batch.labels.shape, dtype=mx.float16)
    loss, exact = (next_token_loss(logits, batch.labels) for logits in (half, half.astype(mx.float32)))
    assert (loss.total.dtype, loss.weight.dtype) == (mx.float32, mx.float32)
    assert loss.total.item() == exact.total.item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_gradient_is_that_of_mlx_cross_entropy(dtype: mx.Dtype) -> None:
    """Values and gradients, each position weighed differently, equal MLX's own to float32's precision."""
    logits = (8 * logits_for((3, 5))).astype(dtype)
    targets, weights = mx.arange(15).reshape(3, 5) * 25, mx.arange(1.0, 16.0).reshape(3, 5)

    def weighed(loss: Callable[[mx.array, mx.array], mx.array]) -> tuple[mx.array, mx.array]:
        return mx.value_and_grad(lambda scores: (loss(scores, targets) * weights).sum())(logits)

    (value, gradient), (expected, slope) = weighed(cross_entropy), weighed(plain_cross_entropy)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == dtype
    assert mx.abs(gradient - slope).max().item() <= (3e-5 if dtype == mx.float32 else 8e-3)  # of up to 15


def plain_cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def test_extreme_logits_stay_finite() -> None:
    """A target whose probability underflows costs its distance from the largest logit, not infinity."""
    logits = mx.array([[0.0, 300.0, -300.0]])
    value, gradient = mx.value_and_grad(lambda scores: cross_entropy(scores, mx.array([2])).sum())(logits)
    assert value.item() == 600.0
    assert gradient.tolist() == [[0.0, 1.0, -1.0]]
