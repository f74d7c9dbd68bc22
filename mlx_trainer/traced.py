"""What crosses into a traced function and back: batches as trees, and state that survives a failed trace."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_trainer.state import key_to_seed, random_key, restore_random_state

Gradients = Any
"""A tree of arrays shaped like the trainable parameters."""

HOST_FIELD = "metadata"
PACKED = {"int32": mx.int32, "float32": mx.float32}
"""Types of NumPy arrays that go to the device in one array."""
PLACE = "\0place"
"""What a leaf that says where such an array stands begins with."""
ALIGNED = 64
"""Each stands behind a multiple of so many numbers, as memory of its own would."""
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""By their number of bytes."""
EXPONENTS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80, mx.float32: 0x7F800000, mx.float64: 0x7FF0000000000000}
"""The exponent's bits of floating-point numbers."""
_batch_types: dict[str, type] = {}


def to_tree(batch: Any) -> Any:
    """The batch as a tree of MLX arrays, for `mx.compile`; an attrs object becomes its type's key and its fields.

    NumPy arrays come packed, behind them the tree, in which leaves say where each stands.
    """
    packing = Packing()
    if not attrs.has(type(batch)):
        tree = tree_map(packing.add, batch)
    else:
        key = f"{type(batch).__qualname__}@{id(type(batch))}"
        _batch_types[key] = type(batch)
        names = [field.name for field in attrs.fields(type(batch)) if field.name != HOST_FIELD]
        tree = key, {name: tree_map(packing.add, getattr(batch, name)) for name in names}
    return packing.array(), tree


def from_tree(tree: Any) -> Any:
    """The batch again, of traced arrays; what stayed on the host is None."""
    packed, tree = tree
    match tree_map(lambda leaf: unpacked(packed, leaf), tree):
        case (str(key), dict(fields)) if key in _batch_types:
            batch_type = _batch_types[key]
            host = {HOST_FIELD: None} if HOST_FIELD in attrs.fields_dict(batch_type) else {}
            return batch_type(**fields, **host)
        case batch:
            return batch


@attrs.define
class Packing:
    """NumPy arrays one behind the other, as one array of 2^n numbers, so that it has the size of most before it.

    On CUDA each array from the host is managed memory, which is slow to get, and which waits for all queued work when
    it is given back (mlx 0.32.4).
    """

    arrays: list[tuple[int, Any]] = attrs.Factory(list)
    """Each behind its place."""
    size: int = 0

    def add(self, leaf: Any) -> Any:
        """Return what stands for `leaf` in the tree; NumPy arrays of other types become MLX arrays of their own."""
        if not isinstance(leaf, np.ndarray):
            return leaf
        if leaf.dtype.name not in PACKED or not leaf.size or not leaf.ndim:
            return mx.array(leaf)
        begin = -(-self.size // ALIGNED) * ALIGNED
        self.arrays.append((begin, leaf.reshape(-1).view(np.int32)))
        self.size = begin + leaf.size
        return f"{PLACE} {begin} {leaf.dtype.name} {','.join(map(str, leaf.shape))}"

    def array(self) -> mx.array | None:
        """Return all of them, int32, or None where there are none."""
        if not self.arrays:
            return None
        numbers = np.zeros(1 << (self.size - 1).bit_length(), np.int32)
        for begin, array in self.arrays:
            numbers[begin : begin + array.size] = array
        return mx.array(numbers)


def unpacked(packed: Any, leaf: Any) -> Any:
    """Return the array, a view, for which `leaf` stands, or else `leaf` itself."""
    if not (isinstance(leaf, str) and leaf.startswith(PLACE)):
        return leaf
    _, begin, kind, lengths = leaf.split(" ")
    shape = [int(length) for length in lengths.split(",")]
    numbers = packed[int(begin) : int(begin) + math.prod(shape)]
    return numbers.view(PACKED[kind]).reshape(shape)


def shape_key(tree: Any) -> tuple[Any, ...]:
    """What `mx.compile` keys its traces by: shapes and types of arrays, and constants."""
    return tuple([(leaf.shape, leaf.dtype) if isinstance(leaf, mx.array) else leaf for leaf in leaves(tree)])


def leaves(tree: Any) -> list[Any]:
    """What stands in a tree, in order; several times faster than `tree_flatten`, which also names them."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return [tree]
    return [leaf for part in tree for leaf in leaves(part)]


def nbytes(tree: Any) -> int:
    """The bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in leaves(tree) if isinstance(leaf, mx.array))


def copied(tree: Any) -> Any:
    """The same arrays in new containers."""
    return tree_map(lambda leaf: leaf, tree)


def assign(target: Any, values: Any) -> None:
    """Put the leaves of `values` into `target`'s own containers; replaced containers would be lost on `mx.compile`."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, (dict, list)):
            assign(target[key], value)
        else:
            target[key] = value


def number(array: mx.array) -> float:
    """The value of a scalar. Reads the device: waits until it is computed."""
    return float(array.item())  # type: ignore[arg-type]


def nonfinite(tree: Any) -> list[str]:
    """Names of the arrays that hold NaN or infinity. Reads the device, one array after the other.

    By the bits of the exponent, which are all set in these alone: 0.6 s per GB on a CPU, where `isfinite` takes 1.2
    (float32) to 4.3 (float16).
    """
    named = dict(tree_flatten(tree))
    floats = {name: array for name, array in named.items() if array.dtype in EXPONENTS and array.size}
    return [name for name, array in floats.items() if largest_exponent(array).item() == EXPONENTS[array.dtype]]


def largest_exponent(array: mx.array) -> mx.array:
    """The highest exponent of an array of floating-point numbers, in its place among their bits."""
    return (array.reshape(-1).view(UNSIGNED[array.itemsize]) & EXPONENTS[array.dtype]).max()


@contextmanager
def restored_on_error(containers: Sequence[Any]) -> Iterator[None]:
    """Put arrays and random state back where tracing fails.

    An exception while `mx.compile` traces leaves the captured containers full of arrays that can never be evaluated
    (mlx 0.32.4). References kept from before are enough to continue bit for bit.
    """
    before, key = [copied(container) for container in containers], random_key()
    try:
        yield
    except BaseException:
        for container, leaves in zip(containers, before, strict=True):
            assign(container, leaves)
        restore_random_state(key_to_seed(key))
        raise
