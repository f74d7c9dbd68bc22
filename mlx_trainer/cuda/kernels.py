"""The kernels of this folder as functions of arrays; none has a gradient of its own, each is a part of another's."""

import math
from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx

from mlx_trainer import runtime
from mlx_trainer.cuda.compiler import TYPES, VECTOR_BYTES, Output, run, working_kind

PARTS = 4
"""The most arrays that `join_columns` puts beside each other."""
MANY = 16
"""The arrays of one launch of `join` and `adamw`."""
NOTHING: Output = ((1,), mx.float32)
"""A result that is not written: of no numbers would be of no memory."""

Item = TypeVar("Item")


def usable(dtype: mx.Dtype, *widths: int) -> bool:
    """Whether there are kernels for numbers of this type, and rows of so many can be moved 16 bytes at once."""
    fits = dtype in TYPES and all(width * dtype.size % VECTOR_BYTES == 0 for width in widths)
    return fits and runtime.backend() == "cuda" and working_kind(dtype) is not None


def take_rows(x: mx.array, index: mx.array) -> mx.array:
    """`x[index]` for x (rows, width) and index (n,)."""
    vectors, rows = x.shape[1] * x.itemsize // VECTOR_BYTES, index.size
    (out,) = run("take_rows", x.dtype, [x, index], [((rows, x.shape[1]), x.dtype)], [rows, vectors], rows * vectors)
    return out


def take_heads(
    arrays: Sequence[mx.array], index: mx.array, table: tuple[mx.array, mx.array], length: int, d: int, back: bool
) -> list[mx.array]:
    """Rows `index` of queries, keys and values, each (rows, heads · d), queries and keys rotated by `table`.

    By the angles of their place in rows of `length`, which to rows is that of the result, and `back` of what is taken.
    """
    heads, kv_heads = (array.shape[1] // d for array in arrays[:2])
    rows, half, dtype = index.size, d // 2, arrays[0].dtype
    threads = rows * (heads + 2 * kv_heads) * half * dtype.size // VECTOR_BYTES
    outputs = [((rows, array.shape[1]), dtype) for array in arrays]
    return run(
        "take_heads", dtype, [*arrays, index, *table], outputs, [rows, length, heads, kv_heads, half, back], threads
    )


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """`silu(gate) · up`."""
    vectors = gate.nbytes // VECTOR_BYTES
    (out,) = run("swiglu", gate.dtype, [gate, up], [(gate.shape, gate.dtype)], [vectors], vectors)
    return out


def swiglu_gradient(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    """Its gradient towards both."""
    vectors, one = gate.nbytes // VECTOR_BYTES, (gate.shape, gate.dtype)
    to_gate, to_up = run("swiglu_gradient", gate.dtype, [gate, up, cotangent], [one] * 2, [vectors], vectors)
    return to_gate, to_up


def join_columns(parts: Sequence[mx.array], scale: float, dtype: mx.Dtype) -> mx.array:
    """Up to `PARTS` float32 arrays (rows, ·) beside each other, times `scale`, as `dtype`."""
    columns = [part.shape[1] for part in parts]
    shape = (parts[0].shape[0], sum(columns))
    scalars = [math.prod(shape), *filled(columns, 0, PARTS), float(scale)]
    (out,) = run("join_columns", dtype, filled(parts, parts[0], PARTS), [(shape, dtype)], scalars, math.prod(shape))
    return out


def split_columns(x: mx.array, columns: Sequence[int], scale: float) -> list[mx.array]:
    """The other way round: x (rows, the sum of `columns`) as float32 arrays (rows, ·), times `scale`."""
    outputs = filled([((x.shape[0], width), mx.float32) for width in columns], NOTHING, PARTS)
    scalars = [x.size, *filled(columns, 0, PARTS), float(scale)]
    return run("split_columns", x.dtype, [x], outputs, scalars, x.size)[: len(columns)]


def join(arrays: Sequence[mx.array]) -> mx.array:
    """Up to `MANY` float32 arrays as one flat one."""
    sizes = [array.size for array in arrays]
    inputs, scalars = filled(arrays, arrays[0], MANY), [*filled(sizes, 0, MANY), sum(sizes)]
    (out,) = run("join", mx.float32, inputs, [((sum(sizes),), mx.float32)], scalars, sum(sizes))
    return out


def adamw(
    gradients: Sequence[mx.array],
    parameters: Sequence[mx.array],
    moments: tuple[Sequence[mx.array], Sequence[mx.array]],
    scalars: Sequence[mx.array],
    accepted: mx.array | None,
    betas: Sequence[float],
) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
    """`optim.AdamW` of up to `MANY` float32 arrays: new parameters and both moments.

    `scalars` are the share of a parameter that is kept, the rate, and epsilon, float32.
    """
    count, sizes = len(parameters), [parameter.size for parameter in parameters]
    inputs = [x for arrays in (gradients, parameters, *moments) for x in filled(arrays, arrays[0], MANY)]
    inputs += [*scalars, mx.array(True) if accepted is None else accepted]
    outputs = filled([(parameter.shape, mx.float32) for parameter in parameters], NOTHING, MANY) * 3
    decays = [float(each) for beta in betas for each in (beta, 1 - beta)]
    constants = [*filled(sizes, 0, MANY), sum(sizes), *decays]
    updated = run("adamw", mx.float32, inputs, outputs, constants, sum(sizes))
    return updated[:count], updated[MANY : MANY + count], updated[2 * MANY : 2 * MANY + count]


def filled(items: Sequence[Item], spare: Item, length: int) -> list[Item]:
    """`items`, and then `spare` until there are so many, since a kernel takes as many each time."""
    return [*items, *[spare] * (length - len(items))]
