"""Attention that keeps its exponentials equals MLX's."""

from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer import runtime
from mlx_trainer.models import attention
from mlx_trainer.models.attention import causal_attention, keeping


def drawn(rows: int, groups: int, heads: int, length: int, spread: float = 1.0) -> list[mx.array]:
    """Queries, keys, values and a cotangent."""
    keys = mx.random.split(mx.random.key(rows * length), 4)
    shapes = [(rows, groups * heads, length, 8), (rows, groups, length, 8)]
    return [mx.random.normal(shapes[i in (1, 2)], key=key) * spread for i, key in enumerate(keys)]


def results(attend: Any, arrays: list[mx.array]) -> list[mx.array]:
    """The output and the three gradients."""
    *inputs, cotangent = arrays
    (output,), gradients = mx.vjp(attend, inputs, [cotangent])
    return [output, *gradients]


@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), st.sampled_from([0.1, 1.0, 5.0]))
@settings(max_examples=50, deadline=None)
def test_equals_mlx(rows: int, groups: int, heads: int, length: int, spread: float) -> None:
    """Output and gradients to 1e-5 of the largest of all, for grouped heads, single tokens, scores of any size."""
    arrays = drawn(rows, groups, heads, length, spread)

    def plain(*inputs: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(*inputs, scale=0.3, mask="causal")

    expected = results(plain, arrays)
    largest = max(mx.abs(value).max().item() for value in expected)
    for found, value in zip(results(lambda *x: keeping(0.3)(*x)[0], arrays), expected, strict=True):
        assert mx.abs(found - value).max().item() <= 1e-5 * largest


@pytest.mark.parametrize(("slow", "kept", "dtype", "own"), [
    (True, 1 << 23, mx.float32, True),
    (False, 1 << 23, mx.float32, False),
    (True, 10, mx.float32, False),
    (True, 1 << 23, mx.bfloat16, False),
])  # fmt: skip
def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch, slow: bool, kept: int, dtype: mx.Dtype, own: bool) -> None:
    """On slow exponentials alone, in float32, and while the scores are few enough to be kept."""
    used: list[float] = []

    def counted(scale: float) -> Any:
        used.append(scale)
        return keeping(scale)

    monkeypatch.setattr(runtime, "slow_exp", lambda: slow)
    monkeypatch.setattr(attention, "KEPT_SCORES", kept)
    monkeypatch.setattr(attention, "keeping", counted)
    queries, keys, values, _ = (array.astype(dtype) for array in drawn(2, 2, 2, 6))
    assert causal_attention(queries, keys, values, 0.5).shape == queries.shape
    assert used == [0.5] * own
