"""Exponentials for training; on Linux CPUs, where MLX takes 8 to 18 ns for each, in about 1 ns.

There `mx.compile` writes a loop in C++, and g++ makes it one over four numbers at a time unless something in it calls a
function or branches. So 2^-t is put together from the bits of a float32: with i = ⌊t⌋ and f = t - i, the bits are

    (125 - i) · 2^23 + 2^24 · 2^-f

where a polynomial gives 2^24 · 2^-f, a number in [2^23, 2^24], to the nearest integer. `benchmarks/cross_entropy.py`.
"""

import mlx.core as mx

from mlx_trainer import runtime
from mlx_trainer.fusion import on_its_own

LOG2_E = 1.4426950408889634
NOTHING = 64
"""2^-64, which is nothing beside a 1 in float32, and all smaller powers are 0. What is masked must have no gradient: a
tiny one makes products denormal further down, with which processors are a hundred times as slow."""
POLYNOMIAL = tuple(
    coefficient * 2.0**24
    for coefficient in (
        *(0.9999999986493101, -0.6931470472976747, 0.24022435546534462, -0.05549103528388813),
        *(0.00958005845344155, -0.0012757162169040523, 0.00010938752381598599),
    )
)
"""Interpolates 2^-f in the Chebyshev nodes of [0, 1], to 3e-9."""


def exp(x: mx.array) -> mx.array:
    """Return e to the power of x for float32 x ≤ 0, exact to 2e-6 for x ≥ -30; on Linux CPUs 0 from 2^-64 on."""
    return power_of_half(x * -LOG2_E) if runtime.linux_cpu() else mx.exp(x)


def sigmoid(x: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-x)), for a float32 x on Linux CPUs 0 from 2^-64 on."""
    if x.dtype != mx.float32 or not runtime.linux_cpu():
        return mx.sigmoid(x)
    power = power_of_half(mx.abs(x) * LOG2_E)
    negative = -mx.right_shift(x.view(mx.int32), 31).astype(mx.float32)  # 0 or 1: a comparison would branch
    return ((1 - negative) + negative * power) / (1 + power)


def power_of_half(t: mx.array) -> mx.array:
    """Return 2^-t for float32 t ≥ 0, or 0 where t ≥ 64; for NaN something finite, and without a gradient."""
    t = on_its_own(mx.minimum(t, float(NOTHING)))  # `minimum` looks for NaN, and so branches
    whole = t.astype(mx.int32)
    f = t - whole.astype(mx.float32)
    c, square = POLYNOMIAL, f * f
    # By Estrin's scheme, since MLX fuses no more than eleven operations that wait for each other.
    low, high = c[0] + c[1] * f + square * (c[2] + c[3] * f), c[4] + c[5] * f + square * c[6]
    mantissa = low + square * square * high
    bits = mantissa.astype(mx.int32) + mx.left_shift(125 - whole, 23)
    some = mx.right_shift(whole - NOTHING, 31)  # all bits where t < 64, else none
    return mx.bitwise_and(bits, some).view(mx.float32)
