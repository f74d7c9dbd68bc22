"""Which rows make which batch: pure functions of the seed, so that resuming replays nothing."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mlx_trainer.data.batch import LENGTH_STEP

Indices = NDArray[np.intp]

MAX_WINDOW = 64
"""Batches whose rows are sorted together: more would pad hardly less, and group the same rows every epoch."""


def generator(*words: int) -> np.random.Generator:
    """A random generator that depends on `words` alone, on every machine and numpy version."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def plan(seed: int, epoch: int, lengths: Sequence[int], batch_size: int, shuffle: bool) -> list[Indices]:
    """The batches of `epoch`: arrays of row numbers, each row in exactly one of them.

    Shuffled rows are sorted by length inside windows of many batches, so that a batch holds rows of nearly equal
    length, then the batches are shuffled. The rows left over for a last, short batch are drawn before the sorting, or
    they would always be the longest. Without `shuffle` rows keep their order.
    """
    rows = len(lengths)
    if not shuffle:
        return [np.arange(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    random = generator(seed, epoch)
    order = random.permutation(rows)
    count = rows // batch_size
    full, rest = order[: count * batch_size], order[count * batch_size :]
    # A quarter of the rows at most: in a small data set one window over all would group the same rows every epoch.
    window = batch_size * min(max(count // 4, 1), MAX_WINDOW)
    # Rows that are padded to the same length are alike, and stay in random order.
    steps = -(-np.asarray(lengths) // LENGTH_STEP)
    parts = [full[start : start + window] for start in range(0, len(full), window)]
    sorted_rows = [part[np.argsort(steps[part], kind="stable")] for part in parts]
    grid = np.concatenate(sorted_rows or [full]).reshape(count, batch_size)
    return [*grid[random.permutation(count)], *([rest] if len(rest) else [])]


def split(seed: int, rows: int, kept: Sequence[int], train_split: float) -> tuple[Indices, Indices]:
    """Positions in `kept` of the training and of the validation rows, ascending.

    `kept` are the numbers, out of `rows` in the file, of the rows that can be used. One permutation of all `rows`
    decides, so that a row keeps its side when another one is repaired or cut. At least one row is held out where
    `train_split` < 1 and two are kept.
    """
    held_out = round(len(kept) * (1 - train_split))
    if train_split < 1:
        held_out = min(max(held_out, 1), len(kept) - 1)
    rank = np.argsort(generator(seed).permutation(rows))[np.asarray(kept, dtype=np.intp)]
    order = np.argsort(rank)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
