"""Products of one x with several frozen weights, some with a LoRA adapter: one function with a gradient of its own.

With y, dy and W of layer i, its adapter a, b already scaled, and x, dx (positions, in):

    low = x @ a     y = x @ Wᵀ + low @ b
    g = dy @ bᵀ     dx = Σᵢ (g @ aᵀ + dy @ W)     da = xᵀ @ g     db = lowᵀ @ dy

An adapter is few FLOPs on large arrays: what it costs is how often x, y and their gradients pass through memory. The
adapters that see the same x share its products (a's side by side), every sum but the first term of dx is made inside a
product, and of the forward pass x and low alone are kept. With dropout an adapter sees an x of its own,
`where(kept, x, 0)`, and a boolean for each element is kept too.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from mlx_trainer.models.quantized import QuantizedLinear, dequantized, dequantizing_wins, result_type

DROPOUT_STEPS = 1 << 16
"""Dropout spends 16 random bits on an element: half the time of `mx.random.bernoulli`, which spends 32."""


@frozen(eq=False)
class Adapter:
    """What adds `scale * (x @ a) @ b` to a layer's output, a (in, rank), b (rank, out).

    `kept` (positions, in) is what dropout leaves of x, and `scale` then makes up for the rest; None drops nothing.
    """

    a: mx.array
    b: mx.array
    scale: float
    kept: mx.array | None = None


def products(x: mx.array, linears: Sequence[nn.Module], adapters: Sequence[Adapter | None]) -> tuple[mx.array, ...]:
    """What each of `linears`, all frozen, and the adapter beside it make of x (positions, in).

    Gradients flow to x and the adapters, to each in its own type. Sums are rounded once where separate layers would
    round each term; else the numbers are the same.
    """
    at = [i for i, adapter in enumerate(adapters) if adapter is not None]
    present = [adapter for adapter in adapters if adapter is not None]
    groups = sharing(present)

    @mx.custom_function
    def forward(x: mx.array, a: list[mx.array], b: list[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        outputs = [linear(x) for linear in linears]
        lows: list[Any] = [None] * len(present)
        for group in groups:
            seen, beside = dropped(x, present[group[0]].kept), side_by_side(a, group, x.dtype)
            for i, low in zip(group, apart(seen @ beside, a, group), strict=True):
                lows[i] = low
                outputs[at[i]] = mx.addmm(outputs[at[i]], low, scaled(b[i], present[i].scale, x.dtype))
        return outputs, lows

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (x, a, b), (dys, _), (_, lows) = primals, cotangents, outputs
        dx: Any = None
        da, db = list(a), list(b)
        for group in groups:
            kept, beside = present[group[0]].kept, side_by_side(a, group, x.dtype)
            g = mx.concatenate([dys[at[i]] @ scaled(b[i], present[i].scale, x.dtype).T for i in group], axis=1)
            dx = plus(dx, dropped(g @ beside.T, kept))
            for i, gradient in zip(group, apart(dropped(x, kept).T @ g, a, group), strict=True):
                da[i] = gradient.astype(a[i].dtype)
                db[i] = (lows[i].T @ dys[at[i]]).astype(b[i].dtype) * present[i].scale
        for linear, dy in zip(linears, dys, strict=True):
            dx = back_through(linear, dx, dy, x)
        return dx.astype(x.dtype), da, db

    outputs: Any = forward(x, [adapter.a for adapter in present], [adapter.b for adapter in present])
    return tuple(outputs[0])


def back_through(linear: Any, dx: mx.array | None, dy: mx.array, x: mx.array) -> mx.array:
    """`dx + dy @ W`; a packed weight is dequantized when `dx` is there, so that one dense weight stands at a time."""
    if type(linear) is nn.Linear:
        weight = linear.weight
    elif type(linear) is QuantizedLinear and dequantizing_wins(dy):
        weight = dequantized(linear, result_type(x, linear), dy if dx is None else dx)
    else:
        return plus(dx, mx.vjp(linear, [x], [dy])[1][0])  # its product with x is never computed
    return dy @ weight if dx is None else mx.addmm(dx, dy, weight)


def sharing(adapters: Sequence[Adapter]) -> list[list[int]]:
    """Which of `adapters` see the same x: those without dropout together, each of the others alone."""
    together = [i for i, adapter in enumerate(adapters) if adapter.kept is None]
    alone = [[i] for i, adapter in enumerate(adapters) if adapter.kept is not None]
    return [together, *alone] if together else alone


def side_by_side(a: Sequence[mx.array], group: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """The adapters' `a` of a group as one matrix, (in, ranks)."""
    return mx.concatenate([a[i].astype(dtype) for i in group], axis=1)


def apart(columns: mx.array, a: Sequence[mx.array], group: Sequence[int]) -> list[mx.array]:
    """The columns of each adapter of a group."""
    ends = list(accumulate(a[i].shape[1] for i in group))
    parts: Any = mx.split(columns, ends[:-1], axis=1)  # its stub says that it returns an array
    return list(parts)


def scaled(b: mx.array, scale: float, dtype: mx.Dtype) -> mx.array:
    """`scale * b`, rounded once."""
    return (scale * b).astype(dtype)


def dropped(x: mx.array, kept: mx.array | None) -> mx.array:
    """`x` where it is kept, else 0."""
    return x if kept is None else mx.where(kept, x, 0)


def plus(total: mx.array | None, term: mx.array) -> mx.array:
    """A sum that starts with its first term."""
    return term if total is None else total + term


def kept(shape: Sequence[int], dropout: float, key: mx.array) -> tuple[mx.array, float]:
    """Which elements dropout leaves, booleans of `shape`, and their share, 1 - dropout rounded to 1 / 65,536.

    A function of `key`, (2,) of uint32, alone: drawn again for a recomputed forward pass, it is the same.
    """
    threshold = min(round(dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1)
    size = math.prod(shape)
    words = mx.random.split(key, -(-size // 4))  # rows of two uint32: MLX's random bits as they are
    bits = words.view(mx.uint16).reshape(-1)[:size].reshape(*shape)
    return bits >= threshold, 1 - threshold / DROPOUT_STEPS
