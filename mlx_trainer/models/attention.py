"""Causal attention for training: MLX's own, and on Linux CPUs, where rows are short, one that keeps its exponentials.

There MLX computes exponentials one by one on one thread, those of attention again for the gradient, and scores of
tokens that are not seen. With scores s = q·k·scale, e = exp(s - max s), z = Σ e and output o = e·v / z, the gradient
needs no exponential more, and one pass over the scores between its products; what concerns whole rows, dividing by z
and subtracting D (as in https://arxiv.org/abs/2205.14135), is done to narrower arrays before them:

    g = do / z,   D = Σ g·o,   ds = e · ([g, -D]·[v, 1]),   dq = ds·k·scale,   dk = dsᵀ·(q·scale),   dv = eᵀ·g
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_trainer import runtime
from mlx_trainer.fusion import on_its_own
from mlx_trainer.models.exponential import LOG2_E, power_of_half

KEPT_SCORES = 1 << 23
"""More scores than these, 32 MB, are not kept: a layer keeps as many as a batch has rows · heads · length²."""
QUERIES = 128
"""So many queries are scored at once, against the keys up to the last of them: fewer score less that is not seen, in
products of a size that is less good for the BLAS."""

Arrays = tuple[mx.array, mx.array, mx.array]


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Return softmax(queries·keys·scale)·values, each token seeing itself and those before it in its row.

    `queries` and the result are (rows, heads, length, d), `keys` and `values` (rows, heads / n, before + length, d):
    what stands before is seen by all.
    """
    rows, heads, length, _ = queries.shape
    if fused(queries.dtype) and length % 128 == 0 and keys.shape[2] % 128:
        raise ValueError(f"{length} queries and {keys.shape[2]} keys: cuDNN's gradient needs a multiple of 128 keys")
    short = rows * heads * length * keys.shape[2] <= KEPT_SCORES
    if short and queries.dtype == mx.float32 and runtime.linux_cpu():
        attend, size, before = keeping(scale), block_size(length), keys.shape[2] - length
        blocks = [(slice(end - size, end), slice(before + end)) for end in range(size, length + size, size)]
        parts = [attend(queries[:, :, own], keys[:, :, seen], values[:, :, seen])[0] for own, seen in blocks]
        return mx.concatenate(parts, axis=2)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")


def fused(dtype: mx.Dtype) -> bool:
    """Whether a kernel trains that never has the scores: cuDNN's, in 16 bits. All others keep them for the gradient."""
    return runtime.cudnn_attention() and dtype != mx.float32


def keeping(scale: float) -> Callable[..., Any]:
    """Attention of the last tokens of rows; returns its output, e and 1 / z, see above."""

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> Arrays:
        (rows, heads, length, d), seen = queries.shape, keys.shape[2]
        grouped = (rows, keys.shape[1], heads // keys.shape[1] * length)
        hidden = mx.where(mx.tri(length, seen, seen - length, dtype=mx.bool_), 0.0, -mx.inf)
        scores = (queries.reshape(*grouped, d) * (scale * LOG2_E)) @ keys.swapaxes(-1, -2)
        # On its own, or the comparisons are made anew for each row.
        scores = scores.reshape(rows, heads, length, seen) + on_its_own(hidden)
        largest = row_max(scores)
        powers = power_of_half(largest - scores)
        sums = powers.sum(axis=-1, keepdims=True) + 0 * largest  # NaN is lost in `powers`
        mixed = (powers.reshape(*grouped, seen) @ values).reshape(queries.shape) / sums
        return mixed, powers, sums

    @attend.vjp
    def attend_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        (queries, keys, values), (mixed, powers, sums) = primals, outputs
        cotangent = cotangents[0] / sums
        (rows, heads, length, d), seen = queries.shape, keys.shape[2]
        grouped = (rows, keys.shape[1], heads // keys.shape[1] * length)
        shared = (cotangent * mixed).sum(axis=-1, keepdims=True)
        lengthened = mx.concatenate([cotangent, -shared], axis=-1).reshape(*grouped, d + 1)
        ones = mx.ones((*values.shape[:-1], 1))
        towards = lengthened @ mx.concatenate([values, ones], axis=-1).swapaxes(-1, -2)
        powers = powers.reshape(*grouped, seen)
        scores = powers * towards
        to_queries = (scores @ keys).reshape(queries.shape) * scale
        to_keys = scores.swapaxes(-1, -2) @ (queries * scale).reshape(*grouped, d)
        return to_queries, to_keys, powers.swapaxes(-1, -2) @ cotangent.reshape(*grouped, d)

    return attend


def block_size(length: int) -> int:
    """Return how many queries are scored at once: a multiple of 8, at most `QUERIES`, so that all blocks are alike."""
    blocks = -(-length // QUERIES)
    return -(-length // (8 * blocks)) * 8


def row_max(x: mx.array) -> mx.array:
    """Return `x.max(axis=-1, keepdims=True)`, on a CPU twice as fast: as the maximum of eight columns."""
    length = x.shape[-1]
    if length % 8:
        return x.max(axis=-1, keepdims=True)
    return x.reshape(*x.shape[:-1], length // 8, 8).max(axis=-2).max(axis=-1, keepdims=True)
