"""A batch without padding: the tokens of all rows one behind the other, and a grid of them for attention alone.

Embedding, norms, linear layers and the MLP see `positions` tokens, nearly all of them real. Attention needs rows:
`grid` gathers the positions into (rows, length), `cells` takes them back. The head sees only the positions that
predict a trained token. Rows that begin alike share the positions of that prefix, which is exact: in a causal model
nothing there depends on what follows.
"""

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from mlx_trainer.data.batches.halves import unpadded_halves
from mlx_trainer.data.batches.padded import BatchMetadata
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.encoding.tokenizer import FloatArray, IntArray
from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.store.store import TokenRow


@frozen(eq=False)
class UnpaddedBatch:
    """Arrays, all but one of int32; `h` below stands for the hidden states of all positions, (positions, hidden).

    - `input_ids` (positions,): the `prefix` tokens of each of `groups`, the rows' own tokens, then padding.
    - `grid` (rows, length): `h[grid]` are the rows' own tokens, padded on the right; cells beyond a row's end hold the
      last position, which is padding. The rows of a group follow each other, equally many in each.
    - `cells` (positions - groups · prefix,): where each position after the prefixes stands in the flattened grid.
      Padding stands in a cell beyond a row's end, which no token attends to, so that nothing that is computed for it
      reaches a loss.
    - `predicting` (predictions,): the positions that predict a trained token, then 0.
    - `targets` (predictions,): the tokens that they predict, then 0.
    - `weights` (predictions,): 1.0 for each of these, then 0.0, float32; the last is 0.0.
    - `predictions` (positions,): where each position stands among the predictions, the last where it does not.

    So each gather's gradient is a gather too: what is computed for padding has no gradient.
    """

    input_ids: IntArray
    grid: IntArray
    cells: IntArray
    predicting: IntArray
    targets: IntArray
    weights: FloatArray
    predictions: IntArray
    metadata: BatchMetadata
    prefix: int = 0
    groups: int = 0
    whole: tuple[int, int, int] | None = None
    """The positions, predictions and rows of the batch that this is half of."""

    def halves(self) -> list["UnpaddedBatch"]:
        """Two batches of half the rows each, or this one alone."""
        return unpadded_halves(self)


def collate_unpadded(rows: Sequence[TokenRow], shape: Shape, predictions: int, *, pad_id: int = 0) -> UnpaddedBatch:
    """The unpadded batch of `rows`, which `shape` must hold, with room for so many `predictions`, one of them unused.

    There is room for as many as there are positions where more than `predictions` are needed. Raises DataError where
    rows of a group begin differently, or train within the prefix.
    """
    input_ids = np.full(shape.tokens, pad_id, np.int32)
    for group, first in enumerate(prefixes_of(rows, shape)):
        input_ids[group * shape.prefix : (group + 1) * shape.prefix] = first
    grid = np.full((shape.rows, shape.length), shape.tokens - 1, np.int32)
    own = [len(row) - shape.prefix for row in rows]
    cells = np.full(shape.tokens - shape.shared, padding_cell(own, shape), np.int32)
    places: list[IntArray] = []
    begin = shape.shared
    for i, (row, length) in enumerate(zip(rows, own, strict=True)):
        positions = np.arange(begin, begin + length, dtype=np.int32)
        input_ids[positions] = row.ids[shape.prefix :]
        grid[i, :length] = positions
        cells[positions - shape.shared] = i * shape.length + np.arange(length, dtype=np.int32)
        places.append(positions[row.trained[shape.prefix :]])
        begin += length
    trained = np.concatenate([*places, np.empty(0, np.int32)])
    room = predictions if len(trained) < predictions else shape.tokens + 1
    predicting, targets, weights = np.zeros(room, np.int32), np.zeros(room, np.int32), np.zeros(room, np.float32)
    predicting[: len(trained)] = trained - 1
    targets[: len(trained)] = input_ids[trained]
    weights[: len(trained)] = 1
    inverse = np.full(shape.tokens, room - 1, np.int32)
    inverse[trained - 1] = np.arange(len(trained))
    metadata = BatchMetadata.of(rows, shape.tokens, shared=shape.shared_tokens(len(rows)))
    arrays = input_ids, grid, cells, predicting, targets, weights, inverse
    return UnpaddedBatch(*arrays, metadata, prefix=shape.prefix, groups=shape.groups)


def prefixes_of(rows: Sequence[TokenRow], shape: Shape) -> list[IntArray]:
    """The prefix of each group of `rows`, (prefix,)."""
    each = shape.rows // max(shape.groups, 1)
    prefixes = [rows[group * each].ids[: shape.prefix] for group in range(shape.groups_of(len(rows)))]
    for i, row in enumerate(rows if shape.groups else ()):
        if not np.array_equal(row.ids[: shape.prefix], prefixes[i // each]) or row.trained[: shape.prefix + 1].any():
            raise DataError(f"{row.source} does not share the {shape.prefix} tokens that it was planned to share.")
    return prefixes


def padding_cell(lengths: Sequence[int], shape: Shape) -> int:
    """A cell of the flattened grid beyond the end of a row; 0 where there is none, and then no padding either."""
    padded = [*lengths, *([0] * (shape.rows - len(lengths)))]
    return next((i * shape.length + n for i, n in enumerate(padded) if n < shape.length), 0)
