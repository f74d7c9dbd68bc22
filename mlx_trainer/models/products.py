"""Products of one x with several frozen weights, some with a LoRA adapter: one function with a gradient of its own.

With y, dy and W of layer i, its adapter a, already scaled, b, and x, dx (positions, in):

    low = x @ a     y = x @ Wᵀ + low @ b
    g = dy @ bᵀ     dx = Σᵢ (g @ aᵀ + dy @ W)     da = xᵀ @ g     db = lowᵀ @ dy

An adapter is few FLOPs on large arrays: what it costs is how often x, y and their gradients pass through memory. The
adapters that see the same x share its products (a's side by side), and every sum but the first term of dx is made
inside a product. Of the forward pass low is kept, and instead of x what it is made of: a norm, or SwiGLU, costs less to
compute again than its result to keep. With dropout an adapter sees an x of its own, `where(kept, x, 0)`, and a boolean
for each element is kept too.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, groupby, islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from mlx_trainer.cuda import kernels
from mlx_trainer.fusion import cast, on_its_own, spread
from mlx_trainer.models.quantized import QuantizedLinear, dequantized, dequantizing_wins, result_type

DROPOUT_STEPS = 1 << 16
"""Dropout spends 16 random bits on an element: half the time of `mx.random.bernoulli`, which spends 32."""


Make = Callable[..., mx.array]
"""What a product's input is made by, of arrays; it trains nothing."""


@frozen(eq=False)
class Adapter:
    """What adds `scale * (x @ a) @ b` to a layer's output, a (in, rank), b (rank, out).

    `kept` (positions, in) is what dropout leaves of x, and `scale` then makes up for the rest; None drops nothing.
    """

    a: mx.array
    b: mx.array
    scale: float
    kept: mx.array | None = None


def products(
    inputs: Sequence[mx.array], make: Make, linears: Sequence[nn.Module], adapters: Sequence[Adapter]
) -> tuple[mx.array, ...]:
    """What each of `linears`, all frozen, the first with the `adapters`, makes of x = `make(*inputs)` (positions, in).

    Gradients flow to the inputs and the adapters, to each in its own type. But for the order of sums, and fewer
    roundings, the numbers are those of separate layers. `make` trains nothing, and is run again for the gradient.
    """
    groups = sharing(adapters)
    masks, scales = [group[0].kept for group in groups], [group[0].scale for group in groups]
    ranks = [[adapter.a.shape[1] for adapter in group] for group in groups]
    dtype = inputs[0].dtype

    def each(lows: Sequence[mx.array]) -> list[mx.array]:
        return [low for together, own in zip(lows, ranks, strict=True) for low in split(together, own)]

    def typed(a: Sequence[mx.array], b: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        own = iter(a)
        narrow = [beside(list(islice(own, len(group))), group[0].scale, dtype) for group in groups]
        return narrow, [up.astype(dtype) for up in b]

    @mx.custom_function
    def forward(inputs: list[mx.array], a: list[mx.array], b: list[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
        x = make(*inputs)
        a, b = typed(a, b)
        lows = [dropped(x, kept) @ together for together, kept in zip(a, masks, strict=True)]
        pairs = zip(linears, each(lows), b, strict=False)
        adapted = [with_adapter(linear, x, low, up) for linear, low, up in pairs]
        return adapted + [linear(x) for linear in linears[len(b) :]], lows

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (inputs, a, b), (dys, _), (_, lows) = primals, cotangents, outputs
        # Without the dependency `mx.compile` would keep each x of the forward pass: it merges what is equal.
        inputs = mx.depends(list(inputs), list(dys))
        x = make(*inputs)
        narrow_a, narrow_b = typed(a, b)
        dlows = iter([dy @ up.T for dy, up in zip(dys, narrow_b, strict=False)])
        g = [mx.concatenate(list(islice(dlows, len(group))), axis=1) for group in groups]
        da = [dropped(mx.depends(x, dlow), kept).T @ dlow for dlow, kept in zip(g, masks, strict=True)]
        db = [low.T @ dy for low, dy in zip(each(lows), dys, strict=False)]
        terms = [dropped(dlow @ together.T, kept) for dlow, together, kept in zip(g, narrow_a, masks, strict=True)]
        dx: Any = reduce(operator.add, terms) if terms else None
        for linear, dy in zip(linears, dys, strict=True):
            dx = back_through(linear, dx, dy, x)
        parts = zip(da, ranks, scales, strict=True)
        da = [one for d, own, scale in parts for one in apart(d, own, scale, a[0].dtype)]
        db = [one for d, up in zip(db, b, strict=True) for one in apart(d, [d.shape[1]], None, up.dtype)]
        da = [d.astype(p.dtype) for d, p in zip(da, a, strict=True)]
        return mx.vjp(make, inputs, [dx.astype(dtype)])[1], da, db

    outputs: Any = forward(list(inputs), [adapter.a for adapter in adapters], [adapter.b for adapter in adapters])
    return tuple(outputs[0])


def beside(parts: Sequence[mx.array], scale: float, dtype: mx.Dtype) -> mx.array:
    """`parts` (in, ·) beside each other, times `scale`, as `dtype`."""
    if kernels.usable(dtype) and len(parts) <= kernels.PARTS and all(part.dtype == mx.float32 for part in parts):
        return kernels.join_columns(parts, scale, dtype)
    x = mx.concatenate(list(parts), axis=1)
    return cast(x * spread(mx.array(scale, x.dtype), x), dtype)


def apart(x: mx.array, columns: Sequence[int], scale: float | None, dtype: mx.Dtype) -> list[mx.array]:
    """The other way round, which is the gradient: the columns of x as `dtype`, times `scale` if there is one."""
    if kernels.usable(x.dtype) and len(columns) <= kernels.PARTS and dtype == mx.float32:
        return kernels.split_columns(x, columns, 1.0 if scale is None else scale)
    x = widened(x, dtype)
    if scale is not None:  # on its own, or it would be fused with what the step does to it
        x = on_its_own(x * spread(mx.array(scale, x.dtype), x))
    return split(x, columns)


def split(x: mx.array, columns: Sequence[int]) -> list[mx.array]:
    """The first so many columns of `x`, the next, and so on."""
    return list(mx.split(x, list(accumulate(columns))[:-1], axis=1))


def widened(product: mx.array, dtype: mx.Dtype) -> mx.array:
    """`product` as `dtype`, fused with nothing, as a product itself is."""
    return product if product.dtype == dtype else on_its_own(product.astype(dtype))


def sharing(adapters: Sequence[Adapter]) -> list[list[Adapter]]:
    """Those of one scale that follow each other and see the same x, which those without dropout do, in one group."""
    return [list(group) for _, group in groupby(adapters, lambda adapter: (id(adapter.kept), adapter.scale))]


def with_adapter(linear: Any, x: mx.array, low: mx.array, b: mx.array) -> mx.array:
    """`linear(x) + low @ b`."""
    return mx.addmm(linear(x), low, b)


def back_through(linear: Any, dx: mx.array | None, dy: mx.array, x: mx.array) -> mx.array:
    """`dx + dy @ W`; a packed weight is dequantized when `dx` is there, so that one dense weight stands at a time."""
    if type(linear) is nn.Linear:
        weight = linear.weight
    elif type(linear) is QuantizedLinear and dequantizing_wins(dy):
        weight = dequantized(linear, result_type(x, linear), dy if dx is None else dx)
    else:
        term: mx.array = mx.vjp(linear, [x], [dy])[1][0]  # its product with x is never computed
        return term if dx is None else dx + term
    return dy @ weight if dx is None else mx.addmm(dx, dy, weight)


def dropped(x: mx.array, kept: mx.array | None) -> mx.array:
    """`x` where it is kept, else 0."""
    return x if kept is None else mx.where(kept, x, 0)


def kept(shape: Sequence[int], dropout: float, key: mx.array) -> tuple[mx.array, float]:
    """Which elements dropout leaves, booleans of `shape`, and their share, 1 - dropout rounded to 1 / 65,536.

    A function of `key`, (2,) of uint32, alone: drawn again for a recomputed forward pass, it is the same.
    """
    threshold = min(round(dropout * DROPOUT_STEPS), DROPOUT_STEPS - 1)
    size = math.prod(shape)
    words = mx.random.split(key, -(-size // 4))  # rows of two uint32: MLX's random bits as they are
    bits = words.view(mx.uint16).reshape(-1)[:size].reshape(*shape)
    return bits >= spread(mx.array(threshold, mx.uint16), bits), 1 - threshold / DROPOUT_STEPS
