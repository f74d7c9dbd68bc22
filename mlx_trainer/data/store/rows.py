"""Rows of one or several token stores as one sequence, read from the disk when they are asked for."""

from collections.abc import Iterator, Sequence
from typing import Any, Self, overload

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from mlx_trainer.data.encoding.tokenizer import IntArray
from mlx_trainer.data.store.store import TokenRow, TokenStore


@frozen(eq=False)
class Rows(Sequence[TokenRow]):
    """Some rows of `stores` in some order: 9 bytes each in memory, whatever they hold."""

    stores: tuple[TokenStore, ...]
    _store: NDArray[np.uint8]
    _index: NDArray[np.int64]

    @classmethod
    def of(cls, stores: Sequence[TokenStore]) -> Self:
        """All rows of `stores`, one behind the other."""
        counts = [store.facts.rows for store in stores]
        which = np.repeat(np.arange(len(stores), dtype=np.min_scalar_type(max(len(stores) - 1, 0))), counts)
        return cls(tuple(stores), which, np.concatenate([*map(np.arange, counts), np.arange(0)]))

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, i: int) -> TokenRow: ...
    @overload
    def __getitem__(self, i: slice) -> "Rows": ...
    def __getitem__(self, i: int | slice) -> "TokenRow | Rows":
        if isinstance(i, slice):
            return self.take(i)
        store, index = self.stores[int(self._store[i])], int(self._index[i])
        return store.row(index)

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[i] for i in range(len(self)))

    def take(self, places: slice | NDArray[Any]) -> "Rows":
        """The rows at `places`, which index or mask them."""
        return Rows(self.stores, self._store[places], self._index[places])

    def column(self, name: str) -> NDArray[Any]:
        """A field of `store.ROW`, (rows,)."""
        columns = [store.column(name) for store in self.stores]
        values = np.concatenate([*columns, np.empty(0, columns[0].dtype)]) if columns else np.empty(0, np.int64)
        return values[self._places()]

    @property
    def each(self) -> int:
        """Rows that belong together and follow each other: 2 where they are pairs, else 1."""
        return 2 if any(store.facts.pairs for store in self.stores) else 1

    @property
    def digests(self) -> NDArray[np.uint64]:
        """64 bits of each row, or of each pair: equal where ids and masks are equal."""
        digests: NDArray[np.uint64] = self.column("digest")
        # Times an odd number before they are added: a pair is not the same the other way round.
        return digests if self.each == 1 else digests[::2] * np.uint64(3) + digests[1::2]

    @property
    def lengths(self) -> IntArray:
        """Tokens of each row, (rows,)."""
        return self.column("length")

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The number of each among all rows of all stores' sources, bad ones included; parts of a row share it."""
        return self.column("number") + self._before([store.facts.total for store in self.stores])[self._store]

    @property
    def store_numbers(self) -> NDArray[np.uint8]:
        """Which of `stores` each row is from, (rows,)."""
        return self._store

    def _places(self) -> NDArray[np.int64]:
        return self._index + self._before([store.facts.rows for store in self.stores])[self._store]

    @staticmethod
    def _before(counts: Sequence[int]) -> NDArray[np.int64]:
        return np.cumsum([0, *counts[:-1]], dtype=np.int64)
