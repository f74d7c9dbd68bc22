"""Few shapes for many lengths: each distinct shape of a batch costs a trace and a compilation, and is kept for good."""

from collections.abc import Callable

import numpy as np
from attrs import field, frozen
from attrs.validators import ge, optional
from numpy.typing import NDArray

Integers = NDArray[np.integer]
Lengths = NDArray[np.int64]

LENGTH_STEP = 8
"""Lengths of batches are multiples of this, and of a power of two more where rows are very long."""
MOST_STEPS = 512
"""The table of `length_classes` has at most this many rows and columns."""
WORTH_A_CLASS = 0.003
"""One class more must save this share of all positions."""


@frozen
class Budget:
    """How large a batch is: a number of `rows`, or as many as fit into `tokens`, but one at least.

    `max_shapes` bounds the distinct shapes of all batches; fewer shapes mean more padding, which counts among the
    tokens unless `unpadded`. Lengths above half of `length_step` are rounded up to a multiple of it. Raises ValueError
    unless exactly one of `rows` and `tokens` is given, and all are 1 or more.

    >>> Budget(tokens=4096).rows_of(1000)
    4
    """

    rows: int | None = field(default=None, validator=optional(ge(1)), kw_only=True)
    tokens: int | None = field(default=None, validator=optional(ge(1)), kw_only=True)
    max_shapes: int = field(default=16, validator=ge(1), kw_only=True)
    unpadded: bool = field(default=False, kw_only=True)
    length_step: int = field(default=LENGTH_STEP, validator=ge(LENGTH_STEP), kw_only=True)

    def __attrs_post_init__(self) -> None:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("give either rows or tokens: one of them decides how large a batch is")

    def rows_of(self, length: int) -> int:
        """How many rows of `length` tokens are one batch."""
        return self.rows or max((self.tokens or 0) // length, 1)


@frozen
class Shape:
    """The shape of a batch: `rows` of at most `length` tokens each, at most `tokens` of them all together.

    A padded batch computes rows · length positions, an unpadded one `tokens`. There the rows may begin with a common
    `prefix` of so many tokens, one for each of `groups` of equally many rows; it counts once among the `tokens`, and
    not in the `length`.
    """

    rows: int
    length: int
    tokens: int
    prefix: int = 0
    groups: int = 0

    @property
    def shared(self) -> int:
        """Tokens of all prefixes together."""
        return self.groups * self.prefix

    def has_room_for(self, other: "Shape") -> bool:
        """Whether a padded batch of `other` would fit into one of this, with room to spare."""
        return self != other and self.rows >= other.rows and self.length >= other.length

    def groups_of(self, rows: int) -> int:
        """How many groups so many rows are, of which the last may be short."""
        return -(-rows * self.groups // self.rows)

    def shared_tokens(self, rows: int) -> int:
        """Tokens of so many rows that are not computed again, since another row begins with them too."""
        return self.prefix * (rows - self.groups_of(rows))

    @property
    def cells(self) -> int:
        """Most tokens that a batch could have."""
        return self.shared + self.rows * self.length


def length_classes(
    lengths: Integers, most: int, fewest_rows: Callable[[int], int], coarse: int = LENGTH_STEP
) -> Lengths:
    """The lengths, ascending, to which rows are padded: at most `most`, each for at least `fewest_rows(length)` rows.

    The longest may be for fewer, or a single row would lengthen many others.

    Found by dynamic programming over the lengths in steps of `LENGTH_STEP`, and of `coarse` above half of that: the
    classes with the fewest positions in all, and no class that saves next to nothing.

    >>> length_classes(np.array([3, 5, 20, 21, 22, 80, 81]), 3, lambda length: 2).tolist()
    [8, 24, 88]
    """
    step = LENGTH_STEP
    while -(-int(lengths.max()) // step) > MOST_STEPS:
        step *= 2
    counts = np.bincount(lengths // step + (lengths % step > 0))  # no -(-lengths // step): they are unsigned
    counts = in_coarse_steps(counts, max(coarse // step, 1))
    steps = np.flatnonzero(counts)
    tops, below = steps * step, np.concatenate([[0], np.cumsum(counts[steps])])
    # A class that begins after the i-th and ends with the j-th distinct length holds inside[i, j] rows.
    inside = below[None, 1:] - below[:-1, None]
    fewest = np.array([fewest_rows(int(top)) for top in tops[:-1]] + [1])
    costs = np.where(inside >= fewest, inside * tops.astype(float), np.inf)
    classes: Lengths = tops[cheapest_ends(costs, most)]
    return classes


def in_coarse_steps(counts: NDArray[np.int64], coarse: int) -> NDArray[np.int64]:
    """`counts` of rows by length, those above half of `coarse` moved up to its next multiple."""
    moved = np.zeros(round_up(len(counts), coarse) + 1, np.int64)
    for length in np.flatnonzero(counts).tolist():
        moved[length if 2 * length <= coarse else round_up(length, coarse)] += counts[length]
    return moved


def grid_length(length: int, coarse: int) -> int:
    """The multiple of `LENGTH_STEP`, above half of `coarse` of that, to which rows of `length` are padded."""
    return round_up(length, LENGTH_STEP if 2 * length <= coarse else coarse)


def round_up(number: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `number`."""
    return -(-number // step) * step


def cheapest_ends(costs: NDArray[np.float64], most: int) -> list[int]:
    """Where up to `most` classes end that cover all of `costs`, a square: [i, j] is the cost of a class from i to j."""
    best, begins = [costs[0]], [np.zeros(len(costs), np.int64)]
    for _ in range(1, min(most, len(costs))):
        joined = best[-1][:-1, None] + costs[1:]  # [i, j]: the last class goes from i + 1 to j
        begins.append(np.argmin(joined, axis=0) + 1)
        best.append(joined.min(axis=0))
    totals = np.array([totals[-1] for totals in best])
    price = WORTH_A_CLASS * totals.min()
    ends = [len(costs) - 1]
    for k in range(int(np.argmin(totals + price * np.arange(len(totals)))), 0, -1):
        ends.append(int(begins[k][ends[-1]]) - 1)
    return ends[::-1]
