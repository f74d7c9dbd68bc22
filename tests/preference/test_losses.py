"""The losses of pairs at the ends of their ranges, beside float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.preference.losses import NEARLY_CERTAIN, hinge_loss, log1mexp, log_odds, odds_ratio_loss

POINTS = [-80.0, -6.0, -1.0, -0.7, -0.69, -0.1, -1e-3, -1e-5]


def test_log1mexp_is_precise_near_0_and_far_from_it() -> None:
    """Values and gradients; -1 / (exp(-x) - 1) is the derivative."""
    x = mx.array(POINTS)
    exact = np.array(x, np.float64)
    expected = np.where(exact > -1, np.log(-np.expm1(exact)), np.log1p(-np.exp(exact)))
    assert np.allclose(log1mexp(x), expected, rtol=2e-6, atol=0)
    gradient = mx.grad(lambda x: log1mexp(x).sum())(x)
    assert np.allclose(gradient, -1 / np.expm1(-exact), rtol=2e-6, atol=0)


@pytest.mark.parametrize("certain", [0.0, -1e-9, NEARLY_CERTAIN / 2])
def test_odds_of_what_is_nearly_certain_are_bounded(certain: float) -> None:
    """They are those of the bound, and a loss of them and its gradient are finite."""
    bound = math.log(math.exp(NEARLY_CERTAIN) / -math.expm1(NEARLY_CERTAIN))
    assert log_odds(mx.array(certain)).item() == pytest.approx(bound, rel=1e-5)
    value, gradient = mx.value_and_grad(lambda x: odds_ratio_loss(mx.array(-2.0), x))(mx.array(certain))
    assert mx.isfinite(value).item()
    assert gradient.item() == 0


def test_a_margin_that_is_wide_enough_costs_nothing() -> None:
    """The hinge is 1 - β r up to r = 1 / β, then 0 and without a gradient."""
    ratios = mx.array([-3.0, 0.0, 9.0, 11.0])
    assert hinge_loss(ratios, 0.1).tolist() == pytest.approx([1.3, 1.0, 0.1, 0.0], abs=1e-6)
    assert mx.grad(lambda r: hinge_loss(r, 0.1).sum())(ratios).tolist() == pytest.approx([-0.1, -0.1, -0.1, 0.0])
