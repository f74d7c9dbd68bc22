"""The positions of an unpadded batch as rows of heads, for attention, and back; each is the other's gradient.

For each token has one cell, and what flows back into padding, and so into cells beyond a row's end, is zero.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from attrs import frozen

from mlx_trainer.cuda import kernels
from mlx_trainer.models.gather import take_rows
from mlx_trainer.models.rotation import plain, rotated, table


@frozen(eq=False)
class Rows:
    """Where positions stand: in `prefix` tokens of each of `groups`, and then by `grid` (rows, length) and `cells`."""

    grid: mx.array
    cells: mx.array
    groups: int
    prefix: int

    @classmethod
    def of(cls, batch: Any) -> "Rows":
        """Those of an unpadded batch."""
        return cls(batch.grid, batch.cells, batch.groups, batch.prefix)

    def heads(self, layer: Any, queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """Queries, keys and values (positions, heads · d) as (rows, heads, length, d), the first two rotated.

        Where there are prefixes these three are theirs, (groups, heads, prefix, d), and the rows' own follow.
        """
        d = queries.shape[1] // layer.n_heads
        if plain(layer.rope, d) and kernels.usable(queries.dtype, d // 2):
            return self._turned(layer.rope.base, d, queries, keys, values)
        counts, ropes = (layer.n_heads, layer.n_kv_heads, layer.n_kv_heads), (layer.rope, layer.rope, None)
        parts = zip(*map(self._rows(), (queries, keys, values)), strict=True)
        offsets = (0, self.prefix) if self.groups else (0,)
        return tuple(
            in_heads(x, count) if rope is None else rotated(rope, in_heads(x, count), offset)
            for part, offset in zip(parts, offsets, strict=True)
            for x, count, rope in zip(part, counts, ropes, strict=True)
        )

    def positions(self, *rows: mx.array) -> mx.array:
        """Rows (rows, length, d), those of the prefixes before the others, as (positions, d)."""
        joined = mx.custom_function(self._joined)
        joined.vjp(lambda rows, cotangent, x: self._split(cotangent))
        return joined(*rows)  # type: ignore[return-value]  # its stub says that it returns an object

    def _rows(self) -> Callable[..., Any]:
        split = mx.custom_function(self._split)
        split.vjp(lambda x, cotangents, rows: self._joined(*cotangents))
        return split

    def _split(self, x: mx.array) -> tuple[mx.array, ...]:
        shared = self.groups * self.prefix
        own = take_rows(x, self.grid.reshape(-1)).reshape(*self.grid.shape, -1)
        return (x[:shared].reshape(self.groups, self.prefix, -1), own) if shared else (own,)

    def _joined(self, *rows: mx.array) -> mx.array:
        own = take_rows(rows[-1].reshape(self.grid.size, -1), self.cells)
        return mx.concatenate([rows[0].reshape(-1, own.shape[1]), own]) if self.groups else own

    def _turned(self, base: float, d: int, *arrays: mx.array) -> tuple[mx.array, ...]:
        """The heads by one kernel for all three, and by the same one back."""
        rows, length = self.grid.shape
        sections = [(self.grid.reshape(-1), self.cells, rows, length, table(length, self.prefix, d // 2, base))]
        if self.groups:
            same = mx.arange(self.groups * self.prefix, dtype=mx.int32)
            angles = table(self.prefix, 0, d // 2, base)
            sections.insert(0, (same, same, self.groups, self.prefix, angles))

        @mx.custom_function
        def turned(*arrays: mx.array) -> tuple[mx.array, ...]:
            return tuple(
                in_heads(x.reshape(rows, length, -1), x.shape[1] // d)
                for grid, _, rows, length, angles in sections
                for x in kernels.take_heads(arrays, grid, angles, length, d, back=False)
            )

        @turned.vjp
        def turned_back(arrays: Any, cotangents: Any, heads: Any) -> tuple[mx.array, ...]:
            flat = [x.transpose(0, 2, 1, 3).reshape(-1, x.shape[1] * d) for x in cotangents]
            parts = [
                kernels.take_heads(flat[3 * i : 3 * i + 3], cells, angles, length, d, back=True)
                for i, (_, cells, _, length, angles) in enumerate(sections)
            ]
            return tuple(mx.concatenate(list(each)) for each in zip(*parts, strict=True))

        return turned(*arrays)  # type: ignore[return-value]


def in_heads(x: mx.array, count: int) -> mx.array:
    """(rows, length, heads · d) as (rows, heads, length, d)."""
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)
