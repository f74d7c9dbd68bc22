"""What crosses into a traced function and back: batches as trees, and state that survives a failed trace."""

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
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""By their number of bytes."""
EXPONENTS = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80, mx.float32: 0x7F800000, mx.float64: 0x7FF0000000000000}
"""The exponent's bits of floating-point numbers."""
_batch_types: dict[str, type] = {}


def to_tree(batch: Any) -> Any:
    """The batch as a tree of MLX arrays, for `mx.compile`; an attrs object becomes its type's key and its fields."""
    if not attrs.has(type(batch)):
        return tree_map(as_array, batch)
    key = f"{type(batch).__qualname__}@{id(type(batch))}"
    _batch_types[key] = type(batch)
    names = [field.name for field in attrs.fields(type(batch)) if field.name != HOST_FIELD]
    return key, {name: tree_map(as_array, getattr(batch, name)) for name in names}


def from_tree(tree: Any) -> Any:
    """The batch again, of traced arrays; what stayed on the host is None."""
    match tree:
        case (str(key), dict(fields)) if key in _batch_types:
            batch_type = _batch_types[key]
            host = {HOST_FIELD: None} if HOST_FIELD in attrs.fields_dict(batch_type) else {}
            return batch_type(**fields, **host)
    return tree


def as_array(leaf: Any) -> Any:
    """NumPy arrays become MLX arrays; everything else stays."""
    return mx.array(leaf) if isinstance(leaf, np.ndarray) else leaf


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
