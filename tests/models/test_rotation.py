"""Rotary positions on Linux CPUs: MLX's own, bit for bit, and their gradient."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import Llama3RoPE

from mlx_trainer import runtime
from mlx_trainer.models.rotation import rotated


def heads(rows: int, count: int, length: int, d: int, seed: int) -> mx.array:
    """Projections of rows as heads, (rows, count, length, d), whose memory has the length before the heads."""
    projected = mx.random.normal((rows, length, count * d), key=mx.random.key(seed))
    return projected.reshape(rows, length, count, d).transpose(0, 2, 1, 3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    count=st.sampled_from([1, 2, 3]),
    length=st.integers(1, 40),
    half=st.integers(1, 9),
    offset=st.sampled_from([0, 1, 500]),
    base=st.sampled_from([1e4, 5e5]),
)
def test_rotations_and_gradients_are_mlxs_own(
    rows: int, count: int, length: int, half: int, offset: int, base: float
) -> None:
    """For any shape and place."""
    x, towards = (heads(rows, count, length, 2 * half, seed) for seed in (0, 1))
    rope = nn.RoPE(2 * half, base=base)
    ours, back = mx.vjp(lambda x: rotated(rope, x, offset), [x], [towards])
    mlxs, mlxs_back = mx.vjp(lambda x: rope(x, offset=offset), [x], [towards])
    assert mx.array_equal(ours[0], mlxs[0]).item()
    assert mx.allclose(back[0], mlxs_back[0], rtol=1e-6, atol=1e-6).item()


@pytest.mark.parametrize(
    ("rope", "dtype"),
    [
        (nn.RoPE(8, traditional=True), mx.float32),
        (nn.RoPE(4), mx.float32),
        (nn.RoPE(8, scale=0.5), mx.float32),
        (nn.RoPE(8), mx.bfloat16),
        (Llama3RoPE(8, scaling_config={"factor": 8.0, "original_max_position_embeddings": 64}), mx.float32),
    ],
    ids=["pairs", "half of them", "scaled", "bfloat16", "llama3"],
)
def test_what_it_does_not_know_is_left_to_the_model(rope: nn.Module, dtype: mx.Dtype) -> None:
    """Other rotations, and 16 bits, by the model's own code."""
    x = heads(2, 2, 5, 8, 0).astype(dtype)
    assert mx.array_equal(rotated(rope, x, 3), rope(x, offset=3)).item()


def test_on_other_machines_it_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a kernel for it."""
    called = []

    class Told(nn.RoPE):
        def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
            called.append(offset)
            return x

    rope = Told(8)
    monkeypatch.setattr("mlx_trainer.models.rotation.nn.RoPE", Told)
    rotated(rope, heads(1, 1, 3, 8, 0), 7)
    assert called == ([] if runtime.linux_cpu() else [7])
    monkeypatch.setattr(runtime, "linux_cpu", lambda: False)
    rotated(rope, heads(1, 1, 3, 8, 0), 7)
    assert called[-1:] == [7]
