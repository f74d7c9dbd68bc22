"""Taking rows of a matrix, at the speed of the memory and with a gradient that is a gather too."""

import mlx.core as mx

from mlx_trainer.cuda import kernels

WIDE = 8
"""Bytes that are moved at once: MLX's gather takes as long for 2 bytes as for 8."""


def take_rows(x: mx.array, index: mx.array) -> mx.array:
    """Return `x[index]` for x (rows, width); without a gradient of its own."""
    if kernels.usable(x.dtype, x.shape[1]):
        return kernels.take_rows(x, index)
    if x.shape[1] * x.itemsize % WIDE:
        return x[index]
    return x.view(mx.uint64)[index].view(x.dtype)


def take_once(x: mx.array, index: mx.array, inverse: mx.array) -> mx.array:
    """Return `x[index]`, each row taken once at most, or without a gradient flowing back.

    `inverse` says where each row of x went, or names a place whose gradient is zero. MLX's own gradient would be a
    scatter, which adds in another order every time on a GPU.
    """

    @mx.custom_function
    def take(x: mx.array) -> mx.array:
        return take_rows(x, index)

    @take.vjp
    def take_vjp(x: mx.array, cotangent: mx.array, taken: mx.array) -> mx.array:
        return take_rows(cotangent, inverse)

    taken: mx.array = take(x)  # type: ignore[assignment]  # its stub says that it returns an object
    return taken
