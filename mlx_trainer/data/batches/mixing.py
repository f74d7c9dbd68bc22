"""Several sources with weights: how many times each row is used in an epoch.

An epoch has a fixed number of places, and which row stands in a place depends on the epoch. A row of a source with
weight 2 has two places. With weight 0.3, the rows of the source are sorted by length and cut into three places for
every ten; the three or four rows of a place take turns, one an epoch, so that no row is used twice before all were.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mlx_trainer.data.batches.shapes import Integers, Lengths


@frozen(eq=False)
class Mixture:
    """The places of an epoch: place i is for the rows `order[first[i] : first[i] + size[i]]` in turn.

    `lengths` are the tokens of the longest of them, so that a plan made for the places fits in every epoch.
    """

    lengths: Integers
    _order: Lengths | None = None
    _first: Lengths | None = None
    _size: Lengths | None = None

    @classmethod
    def of(cls, lengths: Integers, source: Integers, weights: Sequence[float]) -> Self:
        """The places of rows with `lengths`, each of a `source` with a weight."""
        if all(weight == 1 for weight in weights):
            return cls(lengths)
        order = np.lexsort((lengths, source))
        edges = np.searchsorted(source[order], np.arange(len(weights) + 1))
        first, size = [], []
        for begin, end, weight in zip(edges, edges[1:], weights, strict=False):
            rows, times = end - begin, int(weight)
            blocks = begin + blocks_of(rows, weight - times)
            first += [np.repeat(np.arange(begin, end), times), blocks[:-1]]
            size += [np.ones(rows * times, np.int64), np.diff(blocks)]
        begins, sizes = np.concatenate(first), np.concatenate(size)
        return cls(lengths[order[begins + sizes - 1]], order, begins, sizes)

    def common(
        self, prefixes: NDArray[np.integer], families: NDArray[np.uint64]
    ) -> tuple[NDArray[np.integer], NDArray[np.uint64]]:
        """Prefix and family of each place: those of its rows where these have the same, else no prefix."""
        if self._order is None or self._first is None or self._size is None:
            return prefixes, families
        ordered = families[self._order]
        changes = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
        alike = changes[self._first] == changes[self._first + self._size - 1]
        return np.where(alike, prefixes[self._order[self._first]], 0), ordered[self._first]

    def largest(self, values: NDArray[np.integer]) -> Lengths:
        """The largest of `values` (rows,) of the rows that take turns in each place, (places,)."""
        if self._order is None or self._first is None or self._size is None:
            return values.astype(np.int64)
        ends = np.stack([self._first, self._first + self._size], axis=1).reshape(-1)
        padded = np.append(values[self._order], values[:1])  # reduceat takes no end beyond the last
        found: Lengths = np.maximum.reduceat(padded, ends)[::2].astype(np.int64)
        return found

    def rows(self, seed: int, epoch: int, places: NDArray[np.integer]) -> NDArray[np.integer]:
        """The rows that stand in `places` in `epoch`."""
        if self._order is None or self._first is None or self._size is None:
            return places
        # A place begins its turns anywhere, else the shortest rows of all places would come in the same epoch.
        turns = (places.astype(np.int64) * 2654435761 + seed % 2**31 + epoch) % self._size[places]
        rows: NDArray[np.integer] = self._order[self._first[places] + turns]
        return rows


def blocks_of(rows: int, share: float) -> Lengths:
    """Where `rows` are cut into `share` times as many nearly equal blocks; with any share, into one at least."""
    blocks = max(round(rows * share), int(share > 0 and rows > 0))
    return np.arange(blocks + 1) * rows // max(blocks, 1)
