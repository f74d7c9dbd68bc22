"""Many small arrays as few flat ones, so that what is done to each of them is done once.

A GPU takes microseconds for a small array whatever is done to it, and the host as long to ask for it; a step with
adapters on all layers of a 7B model has 448 gradients.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from attrs import evolve, frozen
from mlx.utils import tree_map

from mlx_trainer.cuda import kernels
from mlx_trainer.fusion import spread

SMALL = 1 << 20
"""Arrays of more numbers stand alone: copying them would cost more than it saves."""
ENOUGH = 1 << 22
"""An array of so many numbers is joined by no other; on CUDA neither one of `kernels.MANY` parts."""
ALIGNED = 8
"""MLX moves so many numbers at once, from addresses that are a multiple: what would disturb that stands alone."""


@frozen(eq=False)
class Joined:
    """The numbers of a tree of arrays in few `arrays`, each flat and of one type."""

    arrays: list[mx.array]
    views: Any
    """The tree again, of functions that find each array among such `arrays`."""
    alone: frozenset[int]
    """Which of `arrays` are one array of the tree each."""

    @classmethod
    def of(cls, tree: Any) -> "Joined":
        """Those of `tree`; its small arrays are copied."""
        most = kernels.MANY if kernels.usable(mx.float32) else math.inf
        groups: list[list[mx.array]] = []
        filling: dict[mx.Dtype, int] = {}

        def place(array: mx.array) -> Any:
            alone = array.size > SMALL or array.size % ALIGNED != 0
            number = None if alone else filling.get(array.dtype)
            if number is None or size(groups[number]) >= ENOUGH or len(groups[number]) == most:
                number = len(groups)
                groups.append([])
                if not alone:
                    filling[array.dtype] = number
            begin = size(groups[number])
            groups[number].append(array)
            return partial(view, number, begin, array.shape)

        views = tree_map(place, tree)
        alone = frozenset(number for number, group in enumerate(groups) if len(group) == 1)
        return cls([flat(group) for group in groups], views, alone)

    def map(self, change: Callable[[mx.array], mx.array]) -> "Joined":
        """What `change` makes of each of the numbers."""
        return evolve(self, arrays=[change(array) for array in self.arrays])

    def tree(self, scale: mx.array | None = None) -> Any:
        """The tree again, times `scale`, a float32 scalar, if it is given; nothing else is copied.

        What is joined is multiplied at once, any other array by itself, which is fused with what follows.
        """
        if scale is None:
            return tree_map(lambda find: find(self.arrays), self.views)
        arrays = [
            array if i in self.alone else times(array, spread(scale, array)) for i, array in enumerate(self.arrays)
        ]

        def found(find: Any) -> mx.array:
            array: mx.array = find(arrays)
            return times(array, scale) if find.args[0] in self.alone else array

        return tree_map(found, self.views)


def times(array: mx.array, scale: mx.array) -> mx.array:
    """Their product, made in float32 and of the array's type: a small scale would be 0 in float16."""
    return (array.astype(mx.float32) * scale).astype(array.dtype)


def flat(group: Sequence[mx.array]) -> mx.array:
    """Arrays of one type behind each other."""
    if len(group) == 1:
        return group[0].reshape(-1)
    if group[0].dtype == mx.float32 and kernels.usable(mx.float32):
        return kernels.join(group)
    return mx.concatenate([array.reshape(-1) for array in group])


def view(number: int, begin: int, shape: Sequence[int], arrays: Sequence[mx.array]) -> mx.array:
    """The array of `shape` that begins there in one of `arrays`."""
    return mx.as_strided(arrays[number], shape, offset=begin)


def size(arrays: Sequence[mx.array]) -> int:
    """How many numbers they hold."""
    return sum(array.size for array in arrays)
