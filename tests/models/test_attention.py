"""Attention that keeps its exponentials equals MLX's."""

from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer import runtime
from mlx_trainer.models import attention
from mlx_trainer.models.attention import causal_attention, keeping, row_max


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


@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(1, 40),
    spread=st.sampled_from([0.1, 1.0, 5.0]),
    at_once=st.sampled_from([8, 16, 100]),
)
@settings(max_examples=50, deadline=None)
def test_equals_mlx(rows: int, groups: int, heads: int, length: int, spread: float, at_once: int) -> None:
    """Output and gradients to 1e-5 of the largest of all, for grouped heads, single tokens, scores of any size.

    However many queries are scored at once.
    """
    arrays = drawn(rows, groups, heads, length, spread)

    def plain(*inputs: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(*inputs, scale=0.3, mask="causal")

    expected = results(plain, arrays)
    largest = max(mx.abs(value).max().item() for value in expected)
    with patch.object(runtime, "linux_cpu", lambda: True), patch.object(attention, "QUERIES", at_once):
        ours = results(lambda *x: causal_attention(*x, 0.3), arrays)
    for found, value in zip(ours, expected, strict=True):
        assert mx.abs(found - value).max().item() <= 1e-5 * largest


@pytest.mark.parametrize("length", [5, 8, 24])
def test_the_largest_of_each_row(length: int) -> None:
    """Wherever it stands; a NaN is kept."""
    x = mx.random.normal((3, 50, length), key=mx.random.key(length))
    assert mx.array_equal(row_max(x), x.max(axis=-1, keepdims=True))
    x[0, 0, 2] = mx.nan
    assert mx.isnan(row_max(x)).sum().item() == 1


def test_a_nan_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is not a number makes its row none, and no other."""
    monkeypatch.setattr(runtime, "linux_cpu", lambda: True)
    queries, keys, values, _ = drawn(2, 1, 1, 6)
    keys[1, 0, 4, 0] = mx.nan
    lost = mx.isnan(causal_attention(queries, keys, values, 0.3)).all(axis=-1)
    assert lost.tolist() == [[[False] * 6], [[True] * 6]]


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

    monkeypatch.setattr(runtime, "linux_cpu", lambda: slow)
    monkeypatch.setattr(attention, "KEPT_SCORES", kept)
    monkeypatch.setattr(attention, "keeping", counted)
    queries, keys, values, _ = (array.astype(dtype) for array in drawn(2, 2, 2, 6))
    assert causal_attention(queries, keys, values, 0.5).shape == queries.shape
    assert used == [0.5] * own


def test_what_would_crash_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA in 16 bits, 128 queries with another number of keys than a multiple of 128."""
    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    queries, keys = (mx.zeros((1, 1, length, 8), mx.bfloat16) for length in (128, 144))
    with pytest.raises(ValueError, match="128 queries and 144 keys"):
        causal_attention(queries, keys, keys, 1.0)
