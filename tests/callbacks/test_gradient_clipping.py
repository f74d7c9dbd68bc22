from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mlx_trainer.callbacks import GradientClipping
from mlx_trainer.step import StepContext
from mlx_trainer.trainer import Trainer
from tests.callbacks.toy import Regression, Snapshots, ToyBatch, batches, fit

GRADIENTS = {"a": mx.array([3.0, -4.0]), "b": {"c": mx.array([[12.0]])}}  # global norm 13


def clip(gradients: Any, **options: Any) -> tuple[Any, Any]:
    """Return what GradientClipping makes of `gradients`, and the norm that it reports."""
    context = StepContext(mx.array(1.0), mx.array(1.0), gradients)
    clipped, metrics = GradientClipping(**options).transform_gradients(gradients, context)
    return clipped, metrics["grad_norm"].item()


def test_gradients_above_the_norm_are_scaled_by_torchs_formula() -> None:
    """Each element is multiplied by max_norm / (norm + 1e-6), and the norm reported is the one before."""
    clipped, norm = clip(GRADIENTS, max_norm=6.5)
    scale = np.float32(6.5) / np.float32(13.0 + 1e-6)
    assert clipped["a"].tolist() == pytest.approx([3.0 * scale, -4.0 * scale], rel=1e-6)
    assert clipped["b"]["c"].tolist() == [[pytest.approx(12.0 * scale, rel=1e-6)]]
    assert norm == 13.0


def test_gradients_within_the_norm_stay_as_they_are() -> None:
    """Below max_norm nothing changes, not by a bit."""
    clipped, norm = clip(GRADIENTS, max_norm=13.5)
    assert clipped["a"].tolist() == [3.0, -4.0]
    assert norm == 13.0


def test_elements_are_clipped_by_value() -> None:
    """max_value bounds each element, and max_norm=None leaves the norm alone."""
    clipped, norm = clip(GRADIENTS, max_norm=None, max_value=3.5)
    assert (clipped["a"].tolist(), clipped["b"]["c"].tolist(), norm) == ([3.0, -3.5], [[3.5]], 13.0)


def test_both_limits_hold_together() -> None:
    """The value is clipped first, then the norm of what is left, so that both bounds hold afterwards."""
    clipped, norm = clip({"a": mx.array([3.0, -400.0])}, max_norm=2.5, max_value=4.0)
    assert clipped["a"].tolist() == pytest.approx([1.5, -2.0], rel=1e-6)
    assert norm == pytest.approx(400.01125, rel=1e-6)


def test_half_precision_gradients_keep_their_type_and_their_direction() -> None:
    """The norm is a float32 sum (in float16 it would be infinite), and so small a scale does not become 0."""
    clipped, norm = clip({"a": mx.array([60000.0, 60000.0], mx.float16)}, max_norm=1.0)
    assert clipped["a"].dtype == mx.float16
    assert clipped["a"].tolist() == pytest.approx([0.70710678] * 2, rel=1e-3)
    assert norm == pytest.approx(60000 * 2**0.5, rel=1e-3)


def test_after_another_transform_the_norm_is_that_of_its_gradients() -> None:
    """A second clipping sees and reports what the first one left."""
    context = StepContext(mx.array(1.0), mx.array(1.0), GRADIENTS)
    first, _ = GradientClipping(max_norm=5.0).transform_gradients(GRADIENTS, context)
    _, metrics = GradientClipping(max_norm=1.0).transform_gradients(first, context)
    assert metrics["grad_norm"].item() == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0}, "max_norm is 0"),
        ({"max_norm": -1.0}, "max_norm is -1.0"),
        ({"max_value": 0.0}, "max_value is 0.0"),
        ({"max_norm": None}, "clips nothing"),
    ],
)
def test_limits_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    """A limit of 0, below, or none at all is a mistake and is named."""
    with pytest.raises(ValueError, match=message):
        GradientClipping(**options)


def test_a_run_is_clipped_and_logs_its_norm() -> None:
    """With a tiny max_norm the weights end elsewhere, and train/grad_norm is far above the limit."""
    clipped, plain = Snapshots(), Snapshots()
    _, result = fit([GradientClipping(max_norm=1e-9), clipped])
    fit([plain])
    assert clipped.after[6] != plain.after[6]
    assert result.metrics["train/grad_norm"] > 0.1


def test_the_norm_of_bfloat16_gradients_is_float32() -> None:
    """As a bfloat16 sum it would stop growing at 256 equal elements; direction and type are kept."""
    clipped, norm = clip({"a": mx.full((10_000,), 1e15, mx.bfloat16)}, max_norm=1.0)
    assert norm == pytest.approx(1e17, rel=2**-8)  # as bfloat16 rounds
    assert clipped["a"].dtype == mx.bfloat16
    assert clipped["a"].astype(mx.float32).tolist() == pytest.approx([0.01] * 10_000, rel=2**-7)  # twice


def test_a_norm_of_zero_leaves_zeros() -> None:
    """Not 0/0."""
    clipped, norm = clip({"a": mx.zeros((3,))}, max_norm=1.0)
    assert (clipped["a"].tolist(), norm) == ([0.0, 0.0, 0.0], 0.0)


@pytest.mark.parametrize("bad", [[1.0, float("inf")], [float("nan"), 1.0], [1e30, 1.0]])
def test_a_norm_that_is_not_finite_is_skipped_not_zeroed(bad: list[float]) -> None:
    """Scaled by 1/inf, the finite gradients would silently be 0; all become NaN, and the update is refused."""
    gradients = {"a": mx.array([1.0, 2.0]), "b": mx.array(bad)}
    clipped, norm = clip(gradients)
    assert all(np.isnan(np.array(leaf)).all() for leaf in clipped.values())
    one, guard = mx.array(1.0), GradientClipping()
    refused = StepContext(one, one, gradients, {"grad_norm": mx.array(norm)})
    assert not guard.accept_update(one, clipped, refused).item()
    accepted = StepContext(one, one, GRADIENTS, {"grad_norm": mx.array(clip(GRADIENTS)[1])})
    assert guard.accept_update(one, clip(GRADIENTS)[0], accepted).item()


def test_without_nan_guard_an_infinite_gradient_changes_nothing() -> None:
    """In a run: parameters and optimizer state stay as they are, and the norm in the log tells."""
    seen, made = Snapshots(), batches()
    made[3].y[0] = 1e30  # the loss overflows, and with it the gradient
    _, result = fit([GradientClipping(), seen], made, log_every=6)
    assert seen.after[4] == seen.after[3]
    assert seen.after[5] != seen.after[4]
    assert not np.isfinite(result.metrics["train/grad_norm"])


def test_accumulated_gradients_are_clipped_once_after_the_sum() -> None:
    """Two micro-batches leave the weights of one batch of all their rows; the norm is above the limit."""
    made = batches(2)
    joined = ToyBatch(
        *(np.concatenate([getattr(each, name) for each in made]) for name in ("x", "y")), made[0].metadata
    )
    ends = []
    for data, accumulate in ((made, 2), ([joined], 1)):
        module = Regression()
        module.setup("fit")
        module.model.layers[1] = nn.Identity()
        module.configure_optimizer = lambda _: optimizers.SGD(0.1)  # type: ignore[method-assign]
        trainer = Trainer(callbacks=[GradientClipping(max_norm=0.5)], accumulate=accumulate)
        norm = trainer.fit(module, data).metrics["train/grad_norm"]
        ends.append((norm, np.array(module.model.layers[3].weight)))
    assert ends[0][0] > 0.5
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)
