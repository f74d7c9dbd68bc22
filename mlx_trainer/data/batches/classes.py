"""Classes of rows of nearly equal length: what of a plan is the same in every epoch."""

from itertools import pairwise

import numpy as np
from attrs import evolve, frozen

from mlx_trainer.data.batches.shapes import (
    LENGTH_STEP,
    Budget,
    Integers,
    Lengths,
    Shape,
    grid_length,
    length_classes,
    round_up,
)
from mlx_trainer.data.batches.strata import Stratum

TOKEN_STEP = 16
"""Unpadded batches have a multiple of this many positions."""
ROUNDS_PER_CLASS = 2
"""A class has rows for this many batches at least, or the same rows would meet in every epoch."""
BATCHES_PER_CLASS = 4
"""There are at most as many classes as this goes into the batches, for the same reason."""


@frozen
class LengthClass:
    """Units of rows for one shape: those from `begin` to `end` of all units sorted by size, and `carried` smaller ones.

    They make `batches` full batches of so many `units`; `left` of them are left over, for the next class. None is
    larger than `top`.
    """

    begin: int
    end: int
    carried: int
    units: int
    batches: int
    left: int
    top: int
    shape: Shape


def classes_of(stratum: Stratum, budget: Budget, ranks: int) -> tuple[LengthClass, ...]:
    """The classes of the units of `stratum`, smallest first."""
    sizes, longest = stratum.by_size()
    if len(sizes) == 0:
        return ()
    budget = stratum.budget_of(budget)

    def units_of(top: int) -> int:
        return min(budget.rows_of(top), -(-len(sizes) // ranks))

    most, step = most_classes(sizes, budget, ranks), budget.length_step if stratum.each == 1 else LENGTH_STEP
    tops = length_classes(sizes, most, lambda top: ROUNDS_PER_CLASS * ranks * units_of(top), step)
    edges = [0, *np.searchsorted(sizes, tops, side="right").tolist()]
    classes: list[LengthClass] = []
    for (begin, end), top in zip(pairwise(edges), tops.tolist(), strict=True):
        carried, smaller = (classes[-1].left, classes[-1].top) if classes else (0, 0)
        # A carried unit may be as large as its class allows; that is the largest that it can be in any epoch.
        largest = np.concatenate([np.full(carried, smaller), sizes[begin:end]])
        sharing = ranks if top == tops[-1] else 0
        units = fitting_rows(largest, budget, units_of(top), ranks, sharing) if budget.unpadded else units_of(top)
        rounds, left = divmod(len(largest), units * ranks)
        length = top if stratum.each == 1 else grid_length(int(longest[end - 1]), budget.length_step)
        room = stratum.shape(units, length)
        shape = evolve(room, tokens=whole_steps(stratum.fixed + most_tokens(largest, units, ranks, sharing), room))
        classes.append(LengthClass(begin, end, carried, units, rounds * ranks, left, top, shape))
    return tuple(classes)


def fitting_rows(longest: Integers, budget: Budget, rows: int, ranks: int, sharing: int) -> int:
    """How many rows make an unpadded batch: as many as always fit into the budget's tokens, at least `rows`."""
    if budget.tokens is None:
        return rows
    more = min(budget.tokens * len(longest) // max(int(longest.sum(dtype=np.int64)), 1), -(-len(longest) // ranks))
    while more > rows and most_tokens(longest, more, ranks, sharing) > budget.tokens:
        more -= 1
    return max(more, rows)


def most_classes(lengths: Integers, budget: Budget, ranks: int) -> int:
    """How many classes there may be, for so many batches as a single class would make."""
    batches = len(lengths) // budget.rows_of(int(lengths[-1]))
    return min(max(batches // ranks // BATCHES_PER_CLASS, 1), budget.max_shapes)


def blocks_of(count: int, left: int) -> Lengths:
    """Where `count` rows, sorted by length, are cut into `left` blocks, of each of which one row is left over."""
    return np.arange(left + 1) * count // max(left, 1)


def most_tokens(longest: Integers, rows: int, ranks: int, sharing: int) -> int:
    """The most tokens that a batch of a class can hold in any epoch.

    `longest` are the lengths of its rows, sorted. Whichever row of each block is left over, the k-th longest of the
    others is no longer than if it were the first of its block. With `sharing` ranks, what is left makes batches too.
    """
    rounds, left = divmod(len(longest), rows * ranks)
    blocks = blocks_of(len(longest), left)
    piles = np.delete(longest, blocks[:-1]).reshape(rows, rounds * ranks)
    full = int(piles.max(axis=1, initial=0).sum())
    last = longest[blocks[1:] - 1] if left else longest[:0]
    return max([full, *(int(last[rank::sharing].sum()) for rank in range(sharing))])


def whole_steps(tokens: int, shape: Shape) -> int:
    """Room for `tokens` and for one of padding, a multiple of `TOKEN_STEP`, unless `shape` has fewer positions."""
    return min(round_up(tokens + 1, TOKEN_STEP), shape.cells)
