"""Causal attention for training: MLX's own, and on Linux CPUs, where rows are short, one that keeps its exponentials.

There MLX computes exponentials one by one on one thread, and those of attention again for the gradient. With scores
s = q·k·scale, e = exp(s - max s), z = Σ e and output o = e·v / z, the gradient needs no exponential more, and no pass
over the scores to normalize them (D as in https://arxiv.org/abs/2205.14135):

    D = Σ do·o,   ds = e · (do·v - D) · scale / z,   dq = ds·k,   dk = dsᵀ·q,   dv = eᵀ·(do / z)
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_trainer import runtime

KEPT_SCORES = 1 << 23
"""More scores than these, 32 MB, are not kept: a layer keeps as many as a batch has rows · heads · length²."""

Arrays = tuple[mx.array, mx.array, mx.array]


def causal_attention(queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
    """Return softmax(queries·keys·scale)·values, each token seeing itself and those before it in its row.

    `queries` and the result are (rows, heads, length, d), `keys` and `values` (rows, heads / n, before + length, d):
    what stands before is seen by all.
    """
    rows, heads, length, _ = queries.shape
    short = rows * heads * length * keys.shape[2] <= KEPT_SCORES
    if short and queries.dtype == mx.float32 and runtime.slow_exp():
        mixed: mx.array = keeping(scale)(queries, keys, values)[0]
        return mixed
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask="causal")


def fused(dtype: mx.Dtype) -> bool:
    """Whether a kernel trains that never has the scores: cuDNN's, in 16 bits. All others keep them for the gradient."""
    return runtime.backend() == "cuda" and dtype != mx.float32


def keeping(scale: float) -> Callable[..., Any]:
    """Attention that returns its output, e and 1 / z; see above."""

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> Arrays:
        (rows, heads, length, d), seen = queries.shape, keys.shape[2]
        hidden = mx.where(mx.tri(length, seen, seen - length, dtype=mx.bool_), 0.0, -mx.inf)
        grouped = (rows, keys.shape[1], heads // keys.shape[1] * length)
        scores = (queries.reshape(*grouped, d) * scale) @ keys.swapaxes(-1, -2)
        scores = scores.reshape(rows, heads, length, seen) + hidden
        powers = runtime.exp(scores - scores.max(axis=-1, keepdims=True))
        inverse = 1 / powers.sum(axis=-1, keepdims=True)
        mixed = (powers.reshape(*grouped, seen) @ values).reshape(queries.shape) * inverse
        return mixed, powers, inverse

    @attend.vjp
    def attend_vjp(primals: Arrays, cotangents: Arrays, outputs: Arrays) -> Arrays:
        (queries, keys, values), (mixed, powers, inverse), cotangent = primals, outputs, cotangents[0]
        (rows, heads, length, d), seen = queries.shape, keys.shape[2]
        grouped = (rows, keys.shape[1], heads // keys.shape[1] * length)
        shared = (cotangent * mixed).sum(axis=-1, keepdims=True)
        towards = (cotangent.reshape(*grouped, d) @ values.swapaxes(-1, -2)).reshape(powers.shape)
        scores = (powers * (towards - shared) * (inverse * scale)).reshape(*grouped, seen)
        to_values = powers.reshape(*grouped, seen).swapaxes(-1, -2) @ (cotangent * inverse).reshape(*grouped, d)
        to_keys = scores.swapaxes(-1, -2) @ queries.reshape(*grouped, d)
        return (scores @ keys).reshape(queries.shape), to_keys, to_values

    return attend
