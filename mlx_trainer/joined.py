"""Many small arrays as few flat ones, so that what is done to each of them is done once.

A GPU takes microseconds for a small array whatever is done to it, and the host as long to ask for it; a step with
adapters on all layers of a 7B model has 448 gradients.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from attrs import frozen
from mlx.utils import tree_map

SMALL = 1 << 20
"""Arrays of more numbers stand alone: copying them would cost more than it saves."""
ENOUGH = 1 << 22
"""An array of so many numbers is joined by no other."""
ALIGNED = 8
"""MLX moves so many numbers at once, from addresses that are a multiple: what would disturb that stands alone."""


@frozen(eq=False)
class Joined:
    """The numbers of a tree of arrays in few `arrays`, each flat and of one type."""

    arrays: list[mx.array]
    views: Any
    """The tree again, of functions that find each array among such `arrays`."""

    @classmethod
    def of(cls, tree: Any) -> "Joined":
        """Those of `tree`; its small arrays are copied."""
        groups: list[list[mx.array]] = []
        filling: dict[mx.Dtype, int] = {}

        def place(array: mx.array) -> Any:
            alone = array.size > SMALL or array.size % ALIGNED != 0
            number = None if alone else filling.get(array.dtype)
            if number is None or size(groups[number]) >= ENOUGH:
                number = len(groups)
                groups.append([])
                if not alone:
                    filling[array.dtype] = number
            begin = size(groups[number])
            groups[number].append(array.reshape(-1))
            return partial(view, number, begin, array.shape)

        views = tree_map(place, tree)
        return cls([mx.concatenate(group) if len(group) > 1 else group[0] for group in groups], views)

    def tree(self) -> Any:
        """The tree again; nothing is copied."""
        return tree_map(lambda find: find(self.arrays), self.views)


def view(number: int, begin: int, shape: Sequence[int], arrays: Sequence[mx.array]) -> mx.array:
    """The array of `shape` that begins there in one of `arrays`."""
    return mx.as_strided(arrays[number], shape, offset=begin)


def size(arrays: Sequence[mx.array]) -> int:
    """How many numbers they hold."""
    return sum(array.size for array in arrays)
