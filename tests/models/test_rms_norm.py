"""RMSNorm on Linux CPUs: MLX's own values bit for bit, and its gradients."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer import runtime
from mlx_trainer.models.rms_norm import normed, rms_norm


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(1, 40),
    width=st.sampled_from([1, 3, 8, 64, 129]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    size=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_values_and_gradients_are_mlxs_own(positions: int, width: int, eps: float, size: float) -> None:
    """Of any shape and size; a row of zeros stays one."""
    x, weight, towards = (
        mx.random.normal(shape, key=mx.random.key(seed))
        for seed, shape in enumerate([(positions, width), (width,), (positions, width)])
    )
    x = size * mx.concatenate([x[1:], mx.zeros((1, width))])
    (ours,), gradients = mx.vjp(lambda x, weight: rms_norm(x, weight, eps), [x, weight], [towards])
    (mlxs,), expected = mx.vjp(lambda x, weight: mx.fast.rms_norm(x, weight, eps), [x, weight], [towards])
    assert mx.array_equal(ours, mlxs).item()
    for own, other in zip(gradients, expected, strict=True):
        assert mx.allclose(own, other, rtol=1e-4, atol=1e-5 * mx.abs(other).max().item() + 1e-30).item()


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [(nn.RMSNorm(8), mx.bfloat16), (nn.LayerNorm(8), mx.float32)],
    ids=["16 bits", "another norm"],
)
def test_what_it_does_not_know_is_left_to_the_model(norm: nn.Module, dtype: mx.Dtype) -> None:
    """By the model's own code."""
    x = mx.random.normal((3, 8), key=mx.random.key(0)).astype(dtype)
    assert mx.array_equal(normed(norm, x), norm(x)).item()


def test_elsewhere_it_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a kernel for it."""
    called = []
    monkeypatch.setattr("mlx_trainer.models.rms_norm.rms_norm", lambda x, *_: called.append("here") or x)
    for linux_cpu in (True, False):
        monkeypatch.setattr(runtime, "linux_cpu", lambda linux_cpu=linux_cpu: linux_cpu)
        normed(nn.RMSNorm(8), mx.ones((3, 8)))
    assert called == ["here"]
