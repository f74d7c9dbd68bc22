"""A batch as two halves that cost about the same, which a Linux CPU computes side by side (`step.py`)."""

from typing import Any

import numpy as np
from attrs import evolve
from numpy.typing import NDArray

from mlx_trainer.data.batches.shapes import LENGTH_STEP, Integers, round_up
from mlx_trainer.data.batches.strata import Indices

SPARE = 32
"""Half of an unpadded batch has room for 8 tokens more than half of its own, and for one in so many of a row's."""


def padded_halves(batch: Any) -> list[Any]:
    """The first and the last rows of a padded batch; a single row as it is."""
    middle, names = -(-len(batch.labels) // 2), ("input_ids", "attention_mask", "labels")
    parts = [slice(middle), slice(middle, None)] if middle < len(batch.labels) else []
    return [evolve(batch, **{name: getattr(batch, name)[part] for name in names}) for part in parts] or [batch]


def unpadded_halves(batch: Any) -> list[Any]:
    """An unpadded batch as two, whose shapes follow from its own, which they tell as the `whole`.

    It comes as it is where it has a single row, where rows share a prefix, and where half of the rows need more tokens
    than there is room for, as they may where they differ much in length.
    """
    rows, length = batch.grid.shape
    if rows < 2 or batch.groups:
        return [batch]
    real = real_cells(batch)
    trained = np.where(real, batch.weights[batch.predictions[batch.grid]], 0)
    halves = []
    for chosen in balanced(real.sum(axis=1), trained.sum(axis=1)):
        share, cells, needed = len(chosen) / rows, len(chosen) * length, np.count_nonzero(real[chosen])
        room = min(round_up(round(share * len(batch.input_ids)) + 8 + length // SPARE, LENGTH_STEP), cells)
        if needed >= room and needed < cells:
            return [batch]
        halves.append(part(batch, chosen, real, room, round_up(round(share * len(batch.targets)), LENGTH_STEP)))
    return halves


def real_cells(batch: Any) -> NDArray[np.bool_]:
    """Which cells of the grid of an unpadded batch without prefixes hold a token, (rows, length).

    Where there is a single cell of padding it counts too: it cannot be told from a token, and does no harm.
    """
    real: NDArray[np.bool_] = batch.cells[batch.grid] == np.arange(batch.grid.size).reshape(batch.grid.shape)
    last = batch.grid == len(batch.input_ids) - 1
    return real & ~last if np.count_nonzero(last) > 1 else real


def balanced(tokens: Integers, trained: Integers) -> tuple[Indices, Indices]:
    """The numbers of two halves of rows: as many in each, and one more in the first where they are odd.

    That is the row nearest to the mean or, where it leaves less beyond a half's share, the shortest.
    """
    if len(tokens) % 2 == 0:
        return dealt(tokens, trained)
    mean = tokens.mean()
    singles = int(np.argmin(np.abs(tokens - mean))), int(np.argmin(tokens))
    ways = [dealt(tokens, trained, single) for single in singles]
    return min(ways, key=lambda halves: max(float(tokens[half].sum() - len(half) * mean) for half in halves))


def dealt(tokens: Integers, trained: Integers, single: int | None = None) -> tuple[Indices, Indices]:
    """Two halves of an even number of rows, and of one more, which is in the first.

    Of two rows of nearly equal length each half gets one, such that sums of tokens and of trained tokens come close.
    """
    order = np.argsort(-tokens, kind="stable")
    pairs = order[order != single].reshape(-1, 2) if single is not None else order.reshape(-1, 2)
    more = np.stack([tokens, trained], axis=1)[pairs]
    ahead, swapped = np.zeros(2), np.zeros(len(pairs), np.bool_)
    for i, difference in enumerate(more[:, 0] - more[:, 1]):
        swapped[i] = np.abs(ahead - difference).sum() < np.abs(ahead + difference).sum()
        ahead += -difference if swapped[i] else difference
    pairs = np.where(swapped[:, None], pairs[:, ::-1], pairs)
    first = pairs[:, 0] if single is None else np.append(pairs[:, 0], single)
    return np.sort(first), np.sort(pairs[:, 1])


def part(batch: Any, rows: Indices, real: NDArray[np.bool_], tokens: int, predictions: int) -> Any:
    """Some `rows` of an unpadded batch as one of so many `tokens`, with so many `predictions` as in `collate_unpadded`.

    `real` are the cells that hold tokens, (all rows, length).
    """
    real = real[rows]
    before, cells = batch.grid[rows][real], np.flatnonzero(real)
    places = batch.predictions[before]
    predicting = np.flatnonzero(batch.weights[places])
    room = predictions if len(predicting) < predictions else tokens + 1
    inverse = np.full(tokens, room - 1, np.int32)
    inverse[predicting] = np.arange(len(predicting))
    return evolve(
        batch,
        input_ids=filled(tokens, 0, batch.input_ids[before]),
        grid=np.where(real, np.cumsum(real).reshape(real.shape) - 1, tokens - 1).astype(np.int32),
        cells=filled(tokens, int(np.argmin(real)), cells),
        predicting=filled(room, 0, predicting),
        targets=filled(room, 0, batch.targets[places[predicting]]),
        weights=filled(room, 0, batch.weights[places[predicting]]),
        predictions=inverse,
        whole=(len(batch.input_ids), len(batch.targets), len(batch.grid)),
    )


def filled(size: int, value: int, begin: Any) -> Any:
    """An array (size,) that begins so, and is `value` from there on; of int32, or float32 as `begin` is."""
    array = np.full(size, value, begin.dtype if begin.dtype == np.float32 else np.int32)
    array[: len(begin)] = begin
    return array
