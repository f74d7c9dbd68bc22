"""A batch without padding: the tokens of all rows one behind the other, and a grid of them for attention alone.

Embedding, norms, linear layers and the MLP see `positions` tokens, nearly all of them real. Attention needs rows:
`grid` gathers the positions into (rows, length), `cells` takes them back. The head sees only the positions that
predict a trained token.
"""

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from mlx_trainer.data.batches.padded import IGNORED, BatchMetadata
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.encoding.tokenizer import IntArray
from mlx_trainer.data.store.store import TokenRow


@frozen(eq=False)
class UnpaddedBatch:
    """Arrays of int32; `h` below stands for the hidden states of all positions, (positions, hidden).

    - `input_ids` (positions,): the rows' tokens, then padding.
    - `grid` (rows, length): `h[grid]` are the rows, padded on the right; cells beyond a row's end hold the last
      position, which is padding.
    - `cells` (positions,): where each position stands in the flattened grid. Padding stands in a cell beyond a row's
      end, which no token attends to, so that nothing that is computed for it reaches a loss.
    - `predicting` (predictions,): the positions that predict a trained token, then 0.
    - `targets` (predictions,): the tokens that they predict, then `IGNORED`; the last is `IGNORED`.
    - `predictions` (positions,): where each position stands among the predictions, the last where it does not.

    So each gather's gradient is a gather too: what is computed for padding has no gradient.
    """

    input_ids: IntArray
    grid: IntArray
    cells: IntArray
    predicting: IntArray
    targets: IntArray
    predictions: IntArray
    metadata: BatchMetadata


def collate_unpadded(rows: Sequence[TokenRow], shape: Shape, predictions: int, *, pad_id: int = 0) -> UnpaddedBatch:
    """The unpadded batch of `rows`, which `shape` must hold, with room for so many `predictions`, one of them unused.

    There is room for as many as there are positions where more than `predictions` are needed.
    """
    input_ids = np.full(shape.tokens, pad_id, np.int32)
    grid = np.full((shape.rows, shape.length), shape.tokens - 1, np.int32)
    cells = np.full(shape.tokens, padding_cell(rows, shape), np.int32)
    places: list[IntArray] = []
    begin = 0
    for i, row in enumerate(rows):
        positions = np.arange(begin, begin + len(row), dtype=np.int32)
        input_ids[positions] = row.ids
        grid[i, : len(row)] = positions
        cells[positions] = i * shape.length + np.arange(len(row), dtype=np.int32)
        places.append(positions[row.trained])
        begin += len(row)
    trained = np.concatenate([*places, np.empty(0, np.int32)])
    room = predictions if len(trained) < predictions else shape.tokens + 1
    predicting, targets = np.zeros(room, np.int32), np.full(room, IGNORED, np.int32)
    predicting[: len(trained)] = trained - 1
    targets[: len(trained)] = input_ids[trained]
    inverse = np.full(shape.tokens, room - 1, np.int32)
    inverse[trained - 1] = np.arange(len(trained))
    metadata = BatchMetadata.of(rows, shape.tokens)
    return UnpaddedBatch(input_ids, grid, cells, predicting, targets, inverse, metadata)


def padding_cell(rows: Sequence[TokenRow], shape: Shape) -> int:
    """A cell of the flattened grid beyond the end of a row; 0 where there is none, and then no padding either."""
    lengths = [*map(len, rows), *([0] * (shape.rows - len(rows)))]
    return next((i * shape.length + n for i, n in enumerate(lengths) if n < shape.length), 0)
