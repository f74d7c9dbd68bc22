"""Exponentials made from the bits of a number equal MLX's."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer import runtime
from mlx_trainer.models.exponential import exp, power_of_half, sigmoid

FLOATS = st.floats(width=32, allow_nan=False, min_value=-(2.0**126), max_value=2.0**126)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Linux CPU, wherever the test runs."""
    monkeypatch.setattr(runtime, "linux_cpu", lambda: True)


def float64(x: mx.array) -> np.ndarray:
    return np.array(x).astype(np.float64)


@pytest.mark.parametrize("run", [lambda function: function, mx.compile])
def test_exp_over_what_a_softmax_asks_for(run: Callable[..., Callable[[mx.array], mx.array]]) -> None:
    """Relative, against float64, fused or not; 1 is met exactly, and 0 from 2^-64 on."""
    x = mx.linspace(-30, 0, 100_001)
    assert np.abs(float64(run(exp)(x)) / np.exp(float64(x)) - 1).max() < 2e-6
    extremes = mx.array([0.0, -1e-30, -44.5, -200.0, -3e38, -mx.inf])
    assert run(exp)(extremes).tolist() == [1.0, 1.0, *[0.0] * 4]


def test_whole_powers_are_exact_and_fall() -> None:
    """2^-t for whole t is exact, and beside whole t, where the exponent's bits change, no larger than there."""
    whole = np.arange(64, dtype=np.float32)
    below, above = np.nextafter(whole[1:], np.float32(0)), np.nextafter(whole[:-1], np.float32(99))
    assert np.array_equal(power_of_half(mx.array(whole)), 2.0**-whole)
    for near in (below, above):
        assert np.abs(float64(power_of_half(mx.array(near))) / 2.0 ** -near.astype(np.float64) - 1).max() < 2e-7


@given(st.lists(FLOATS | st.floats(-60, 60, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_sigmoid(values: list[float]) -> None:
    """Of any number: relative where it is above 2^-64, and 1 - sigmoid(x) is sigmoid(-x)."""
    x = mx.array(values)
    expected = 1 / (1 + np.exp(-np.clip(float64(x), -700, 700)))
    assert np.allclose(float64(sigmoid(x)), expected, rtol=3e-6, atol=2.0**-64)
    assert np.allclose(float64(sigmoid(x)) + float64(sigmoid(-x)), 1, rtol=2e-7)


def test_other_types_and_devices_have_mlx_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit numbers, and exponentials where they are not slow, are MLX's to the bit."""
    x = -mx.abs(mx.random.normal((100,), key=mx.random.key(0)))
    half = x.astype(mx.float16)
    assert mx.array_equal(sigmoid(half), mx.sigmoid(half))
    monkeypatch.setattr(runtime, "linux_cpu", lambda: False)
    assert mx.array_equal(sigmoid(x), mx.sigmoid(x))
    assert mx.array_equal(exp(x), mx.exp(x))
