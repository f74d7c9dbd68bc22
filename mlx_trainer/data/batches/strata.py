"""Strata: which rows are planned together, because they share a prefix or because they share none.

What is computed once is the prefix of a batch whose rows all begin with it, such as a system prompt, or that of each
unit of a few rows, such as several answers to one prompt. Rows of different strata never meet in a batch.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
from attrs import evolve, frozen
from numpy.typing import NDArray

from mlx_trainer.data.batches.shapes import Budget, Integers, Lengths, Shape

Indices = NDArray[np.integer]

WORTH_A_STRATUM = 0.01
"""A stratum must save this share of all positions, and a batch more: it has shapes and a short batch of its own."""


@frozen(eq=False)
class Stratum:
    """Units of `each` rows, which are dealt to batches: `units` (units, each), or None where row i is unit i.

    `sizes` are the positions of each unit, `longest` the tokens that the longest of its rows adds to the prefix. With
    `once`, all rows of the stratum share the `prefix`, which stands once in a batch; else each unit has one of its own.
    """

    sizes: Integers
    longest: Integers
    units: Indices | None = None
    prefix: int = 0
    once: bool = False

    @property
    def each(self) -> int:
        """Rows of a unit."""
        return 1 if self.units is None else self.units.shape[1]

    @property
    def fixed(self) -> int:
        """Positions of a batch besides those of its units."""
        return self.prefix if self.once else 0

    def by_size(self) -> tuple[Integers, Integers]:
        """Sizes in ascending order, and beside each the longest row up to there."""
        if self.longest is self.sizes:
            lengths = np.sort(self.sizes, kind="stable")
            return lengths, lengths
        order = np.argsort(self.sizes, kind="stable")
        return self.sizes[order], np.maximum.accumulate(self.longest[order])

    def budget_of(self, budget: Budget) -> Budget:
        """The same budget in units, without what every batch has."""
        if budget.rows is not None:
            return evolve(budget, rows=max(budget.rows // self.each, 1))
        return evolve(budget, tokens=max((budget.tokens or 0) - self.fixed, 1))

    def shape(self, units: int, length: int) -> Shape:
        """The shape of a batch of so many units, whose rows have `length` tokens behind the prefix, all cells full."""
        groups = (1 if self.once else units) if self.prefix else 0
        shape = Shape(units * self.each, length, 0, self.prefix, groups)
        return evolve(shape, tokens=shape.cells)

    def rows(self, units: Indices) -> Indices:
        """The rows of some units, (…, units) in and (…, rows) out, unit by unit."""
        if self.units is None:
            return units
        return self.units[units].reshape(*units.shape[:-1], units.shape[-1] * self.each)


def plain(lengths: Integers) -> Stratum:
    """All rows, sharing nothing."""
    lengths = narrow(lengths)
    return Stratum(lengths, lengths)


def narrow(lengths: Integers) -> Integers:
    """The same lengths in 16 bits where they fit, which numpy sorts several times as fast."""
    lengths = np.asarray(lengths)
    return lengths.astype(np.uint16) if lengths.max(initial=0) < 2**16 else lengths


def strata_of(
    lengths: Integers, prefixes: Integers, families: NDArray[np.uint64], budget: Budget, ranks: int = 1
) -> tuple[Stratum, ...]:
    """The strata of rows with `lengths`; those of the same one of `families` begin with the same so many `prefixes`.

    Those that save most positions come first, at most half as many as there may be shapes, and last the rows that share
    nothing. The same for every epoch.
    """
    # Attention's keys are a prefix and a row: with a row's length, their number is a multiple of `length_step` too.
    sharing = Sharing.of(lengths, prefixes // budget.length_step * budget.length_step, families)
    positions = float(lengths.sum(dtype=np.int64))
    batch = budget.tokens or (budget.rows or 0) * positions / max(len(lengths), 1)
    strata: list[Stratum] = []
    while len(strata) < budget.max_shapes // 2:
        saved, make = max(sharing.best_family(budget, ranks), sharing.best_units(budget), key=lambda found: found[0])
        stratum = make()
        rows = stratum.rows(np.arange(len(stratum.sizes)))
        others = np.count_nonzero(sharing.left) > len(rows)
        if saved < WORTH_A_STRATUM * positions + (batch if others else 0):
            break
        strata.append(stratum)
        sharing.left[rows] = False
    rest = np.flatnonzero(sharing.left)
    if not strata:
        return (plain(lengths),)
    return (*strata, replace_rows(plain(lengths[rest]), rest)) if len(rest) else tuple(strata)


def share_shapes(strata: Sequence[Stratum], budget: Budget) -> list[Budget]:
    """The budget of each stratum: every one may have one shape, and those with most positions most of the others."""
    positions = np.array([stratum.sizes.sum(dtype=np.int64) for stratum in strata], float)
    more = np.floor((budget.max_shapes - len(strata)) * positions / max(positions.sum(), 1.0)).astype(int)
    return [evolve(budget, max_shapes=1 + count) for count in more.tolist()]


Found = tuple[float, Callable[[], Stratum]]
"""Positions that a stratum saves, and the stratum."""
NOTHING: Found = 0.0, lambda: plain(np.empty(0, np.int64))


@frozen(eq=False)
class Sharing:
    """Rows and the families that share a prefix: row i is of family `family[i]`, which shares `prefixes[family[i]]`."""

    lengths: Integers
    family: Lengths
    prefixes: Lengths
    left: NDArray[np.bool_]
    """The rows that are in no stratum yet."""

    @classmethod
    def of(cls, lengths: Integers, prefixes: Integers, families: NDArray[np.uint64]) -> Self:
        """All rows; those without a prefix are of family 0."""
        sharing = np.flatnonzero(prefixes)
        _, first, inverse = np.unique(families[sharing], return_index=True, return_inverse=True)
        family = np.zeros(len(lengths), np.int64)
        family[sharing] = inverse + 1
        common = np.concatenate([[0], prefixes[sharing][first]]).astype(np.int64)
        return cls(lengths.astype(np.int64), family, common, np.ones(len(lengths), np.bool_))

    def counts(self) -> tuple[Lengths, NDArray[np.float64]]:
        """How many rows are left of each family, and the tokens of each of them behind the prefix, on average."""
        rows = self.family[self.left]
        counts = np.bincount(rows, minlength=len(self.prefixes))
        tokens = np.bincount(rows, self.lengths[self.left], minlength=len(self.prefixes))
        return counts, tokens / np.maximum(counts, 1) - self.prefixes

    def best_family(self, budget: Budget, ranks: int) -> Found:
        """The family with a batch or more for each rank that saves most where its prefix stands once in a batch."""
        counts, own = self.counts()
        if budget.rows is not None:
            rows = np.full(len(counts), budget.rows)
        else:
            rows = np.maximum(((budget.tokens or 0) - self.prefixes) // np.maximum(own, 1), 0)
        whole = (rows > 1) & (counts >= rows * ranks)
        saved = np.where(whole, self.prefixes * (counts - counts // np.maximum(rows, 1)), 0)
        family = int(np.argmax(saved))
        return float(saved[family]), lambda: self.together(family)

    def together(self, family: int) -> Stratum:
        """The rows of a family, their prefix once in each batch."""
        rows, prefix = np.flatnonzero(self.left & (self.family == family)), int(self.prefixes[family])
        return replace_rows(plain(self.lengths[rows] - prefix), rows, prefix=prefix, once=True)

    def best_units(self, budget: Budget) -> Found:
        """The size of units and of their prefix that saves most."""
        counts, own = self.counts()
        levels, best = coarse(self.prefixes), NOTHING
        for each in (2, 4, 8, 16):
            if each > (budget.rows or each):
                break
            fits = levels + each * own <= (budget.tokens or math.inf)
            saved = np.bincount(levels, np.where(fits, counts // each * (each - 1) * levels, 0))
            level = int(np.argmax(saved))
            if saved[level] > best[0]:
                best = float(saved[level]), partial(self.apart, level, each, budget.tokens)
        return best

    def apart(self, level: int, each: int, tokens: int | None) -> Stratum:
        """Units of `each` rows of nearly equal length that share `level` tokens, and have `tokens` at most."""
        rows = np.flatnonzero(self.left & (coarse(self.prefixes)[self.family] == level))
        rows = rows[np.lexsort((self.lengths[rows], self.family[rows]))]
        family = self.family[rows]
        begins = np.searchsorted(family, family)  # where the family of each begins
        place, count = np.arange(len(rows)) - begins, np.bincount(family)[family]
        units = rows[place < count // each * each].reshape(-1, each)
        own = self.lengths[units] - level
        sizes = level + own.sum(axis=1)
        small = sizes <= (tokens or math.inf)
        return Stratum(sizes[small], own.max(axis=1)[small], units[small], level)


def replace_rows(stratum: Stratum, rows: Indices, **changes: Any) -> Stratum:
    """The stratum with other numbers for its rows."""
    return evolve(stratum, units=rows[:, None], **changes)


def coarse(prefixes: Lengths) -> Lengths:
    """Prefixes rounded down to few lengths: 32, 48, 64, 96, 128, 192, 256, …"""
    steps = 2 ** np.maximum(np.floor(np.log2(np.maximum(prefixes, 1))) - 1, 4).astype(np.int64)
    rounded: Lengths = prefixes // steps * steps
    return rounded
