"""What `mx.compile` must not fuse.

It makes one kernel of operations that follow each other, and has it compiled when it first runs: 4 seconds each on
CUDA, 0.7 on Linux CPUs, one after the other. For a single operation MLX brings a kernel. Many fused operations on large
arrays are worth theirs; a few on scalars, or a number times an array, which is two operations (one spreads the number),
are not. A view costs the device nothing, the host 1 to 3 µs, and nothing is fused with it.
`benchmarks/first_step.py` counts kernels.
"""

from collections.abc import Callable

import mlx.core as mx

INTEGERS = {1: (mx.uint8, mx.int8), 2: (mx.uint16, mx.int16), 4: (mx.uint32, mx.int32), 8: (mx.uint64, mx.int64)}
"""Two types of so many bytes: a view of the type that an array has is none."""


def on_its_own(x: mx.array) -> mx.array:
    """Return `x` such that what made it and what follows are not fused with it; without a gradient."""
    unsigned, signed = INTEGERS[x.dtype.size]
    return x.view(signed if x.dtype == unsigned else unsigned).view(x.dtype)


def one_by_one(scalar: mx.array, *operations: Callable[[mx.array], mx.array]) -> mx.array:
    """Return what `operations`, single ones, make of `scalar` in turn, none fused with another."""
    for operation in operations:
        scalar = mx.contiguous(operation(scalar))  # one is contiguous as it is, so that nothing is copied
    return scalar


def spread(scalar: mx.array, like: mx.array) -> mx.array:
    """Return `scalar` in the shape of `like`, such that an operation on both is a single one; nothing is copied."""
    return on_its_own(mx.broadcast_to(scalar, like.shape))


def cast(x: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return `x` as `dtype`, fused with nothing; `x` itself where it is that."""
    return x if x.dtype == dtype else on_its_own(on_its_own(x).astype(dtype))


def all_finite(*scalars: mx.array) -> mx.array:
    """Return whether neither NaN nor infinity is among `scalars`, a boolean; their sum has to be finite too."""
    return mx.abs(mx.stack(list(scalars))).sum() < mx.inf
