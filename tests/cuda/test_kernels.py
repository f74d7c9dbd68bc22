"""The package's CUDA kernels compute what MLX's operations do; here on a CPU, see emulator.py."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_trainer.cuda import kernels
from mlx_trainer.models.rotation import table
from mlx_trainer.optim import build_optimizer
from tests.cuda import emulator

KINDS = st.sampled_from([mx.float32, mx.bfloat16, mx.float16])
ULP = {mx.float32: 2.0**-22, mx.bfloat16: 2.0**-8, mx.float16: 2.0**-10}
"""Twice the rounding of each type."""


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels."""
    emulator.use(monkeypatch)


def close(ours: mx.array, expected: mx.array, dtype: mx.Dtype) -> bool:
    """Whether they differ by no more than the roundings of `dtype`, and of float32 beside the largest number."""
    assert (ours.shape, ours.dtype) == (expected.shape, dtype)
    ours, expected = ours.astype(mx.float32), expected.astype(mx.float32)
    size = mx.abs(expected)
    return bool((mx.abs(ours - expected) <= ULP[dtype] * size + 1e-6 * size.max()).all().item())


def normal(shape: tuple[int, ...], dtype: mx.Dtype, seed: int = 0) -> mx.array:
    """Random numbers, a few of them large."""
    random = np.random.default_rng(seed)
    return mx.array((random.normal(size=shape) * random.choice([0.1, 1, 30], size=shape)).astype(np.float32)).astype(
        dtype
    )


@settings(max_examples=20, deadline=None)
@given(KINDS, st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_rows_are_taken_bit_for_bit(dtype: mx.Dtype, rows: int, taken: int, vectors: int, seed: int) -> None:
    """Any rows, as often as asked for."""
    x = normal((rows, 8 * vectors), dtype, seed)
    index = mx.array(np.random.default_rng(seed).integers(0, rows, taken).astype(np.int32))
    assert mx.array_equal(kernels.take_rows(x, index), x[index]).item()


@settings(max_examples=20, deadline=None)
@given(KINDS, st.integers(1, 9), st.integers(0, 99))
def test_swiglu_and_its_gradient(dtype: mx.Dtype, rows: int, seed: int) -> None:
    """Against float32, rounded once."""
    gate, up, towards = (normal((rows, 16), dtype, 3 * seed + i) for i in range(3))
    wide = [x.astype(mx.float32) for x in (gate, up)]
    (expected,), gradients = mx.vjp(lambda gate, up: nn.silu(gate) * up, wide, [towards.astype(mx.float32)])
    assert close(kernels.swiglu(gate, up), expected.astype(dtype), dtype)
    for ours, gradient in zip(kernels.swiglu_gradient(gate, up, towards), gradients, strict=True):
        assert close(ours, gradient.astype(dtype), dtype)


@settings(max_examples=20, deadline=None)
@given(KINDS, st.integers(1, 4), st.integers(1, 5), st.sampled_from([(4, 2), (2, 2), (3, 1)]), st.integers(0, 40))
def test_heads_are_taken_and_rotated(
    dtype: mx.Dtype, rows: int, length: int, heads: tuple[int, int], offset: int
) -> None:
    """As by MLX's rotary positions of rows, and back, which is the gradient of that."""
    d, base, positions = 32, 10_000.0, rows * length
    counts = (heads[0], heads[1], heads[1])
    arrays = [normal((positions, count * d), dtype, offset + i) for i, count in enumerate(counts)]
    order = np.random.default_rng(offset).permutation(positions).astype(np.int32)
    rope, angles = nn.RoPE(d, base=base), table(length, offset, d // 2, base)

    def plainly(*arrays: mx.array) -> list[mx.array]:
        cut = [x[mx.array(order)].reshape(rows, length, -1, d).transpose(0, 2, 1, 3) for x in arrays]
        turned = [rope(cut[0], offset=offset), rope(cut[1], offset=offset), cut[2]]
        return [x.transpose(0, 2, 1, 3).reshape(positions, -1) for x in turned]

    wide = [x.astype(mx.float32) for x in arrays]
    expected, back = mx.vjp(plainly, wide, wide)
    for ours, x in zip(kernels.take_heads(arrays, mx.array(order), angles, length, d, False), expected, strict=True):
        assert close(ours, x.astype(dtype), dtype)
    cells = mx.array(np.argsort(order).astype(np.int32))
    for ours, x in zip(kernels.take_heads(arrays, cells, angles, length, d, True), back, strict=True):
        assert close(ours, x.astype(dtype), dtype)


@settings(max_examples=20, deadline=None)
@given(KINDS, st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(-4, 4))
def test_columns_are_joined_and_split(dtype: mx.Dtype, rows: int, columns: list[int], scale: float) -> None:
    """Of any widths; split they are float32."""
    parts = [normal((rows, width), mx.float32, i) for i, width in enumerate(columns)]
    beside = mx.concatenate(parts, axis=1)
    joined = kernels.join_columns(parts, scale, dtype)
    assert close(joined, (beside * scale).astype(dtype), dtype)
    split = kernels.split_columns(beside.astype(dtype), columns, scale)
    for ours, part in zip(split, parts, strict=True):
        assert close(ours, part.astype(dtype).astype(mx.float32) * scale, mx.float32)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=kernels.MANY))
def test_arrays_are_joined(sizes: list[int]) -> None:
    """Of any sizes, as many as one launch takes."""
    arrays = [normal((size,), mx.float32, i) for i, size in enumerate(sizes)]
    assert mx.array_equal(kernels.join(arrays), mx.concatenate(arrays)).item()


@pytest.mark.parametrize("accepted", [None, True, False])
def test_adamw_of_many(accepted: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More arrays than one launch takes, of which one is large and one in 16 bits: as each by itself, or not at all."""
    monkeypatch.setattr("mlx_trainer.optim.SMALL", 100)
    shapes = [(3, 4), (101,), *[(i,) for i in range(1, 21)]]
    parameters = {str(i): normal(shape, mx.float32, i) for i, shape in enumerate(shapes)}
    parameters["half"] = normal((5,), mx.float16, 50)
    results = []
    for many in (True, False):
        monkeypatch.setattr(kernels, "usable", emulator.fits if many else lambda *_: False)
        optimizer = build_optimizer("adamw", 0.01, weight_decay=0.1, schedule="cosine", total_steps=9)
        optimizer.accepted = None if accepted is None else mx.array(accepted)  # type: ignore[attr-defined]
        values = parameters
        for step in range(3):
            gradients = {name: normal(x.shape, x.dtype, 7 * step + len(name)) for name, x in values.items()}
            values = optimizer.apply_gradients(gradients, values)
        results.append(dict(tree_flatten([values, optimizer.state])))
    assert results[0].keys() == results[1].keys()
    for name, expected in results[1].items():
        assert mx.allclose(results[0][name], expected, rtol=1e-6, atol=1e-8).item(), name
    same = [mx.array_equal(results[0][f"0.{name}"], x).item() for name, x in parameters.items()]
    assert all(same) if accepted is False else not any(same)
