"""Rotary positions (https://arxiv.org/abs/2104.09864) on Linux CPUs, as one operation.

MLX's own are some twenty there, and put the halves of their result together by a copy of all of it. With the halves of
x as the two rows of X, and X' the same rows in the other order, which is a view, the rotation by angles t is

    X · cos t + X' · [-sin t, sin t]

and its gradient is the rotation back.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_trainer import runtime

KEPT = 32
"""Tables that are kept: one for each length, offset and base, of 1.5 MB for 2,048 positions and heads of 128."""


def rotated(rope: Any, x: mx.array, offset: int) -> mx.array:
    """Return `rope(x, offset=offset)` for x (rows, heads, length, d), whatever `rope` is."""
    if plain(rope, x.shape[-1]) and x.dtype == mx.float32 and runtime.linux_cpu():
        rope = rotation(*table(x.shape[2], offset, rope.dims // 2, rope.base))
        return rope(x)  # type: ignore[no-any-return]
    return rope(x, offset=offset)  # type: ignore[no-any-return]


def plain(rope: Any, d: int) -> bool:
    """Whether a `table` has the angles of `rope` for heads of d."""
    return type(rope) is nn.RoPE and not rope.traditional and rope.dims == d and rope.scale == 1.0


def rotation(cosines: mx.array, sines: mx.array) -> Callable[..., Any]:
    """The rotation of a `table`; its gradient is the one back."""

    @mx.custom_function
    def forward(x: mx.array) -> mx.array:
        return turned(x, cosines, sines)

    @forward.vjp
    def backward(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return turned(cotangent, cosines, -sines)

    return forward


def turned(x: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Each half of x's last axis times `cosines` (length, 1, d / 2), and the other times `sines` (length, 2, d / 2)."""
    halves = mx.unflatten(x, -1, (2, -1))
    return mx.flatten(halves * cosines + halves[..., ::-1, :] * sines, -2, -1)


@lru_cache(KEPT)
def table(length: int, offset: int, half: int, base: float) -> tuple[mx.array, mx.array]:
    """Return the cosines (length, 1, half) of the angles at these positions, and the sines (length, 2, half), signed.

    In float32, in the order of MLX's own.
    """
    frequencies = mx.exp(mx.arange(0, -half, -1, mx.float32) * (np.log(np.float32(base)) / np.float32(half)).item())
    angles = mx.arange(offset, offset + length)[:, None] * frequencies
    sines = mx.sin(angles)
    made = mx.cos(angles)[:, None], mx.stack([-sines, sines], axis=1)
    mx.eval(made)
    return made
