"""Which rows begin alike, such as with a system prompt, few-shot examples, or one question that has several answers.

Found by digests of the first 16, 32, 48, … tokens of all rows at once; rows whose digest no other row has fall out, so
that the cost is in the tokens that are shared. Whoever uses a prefix compares the tokens themselves.
"""

from itertools import count

import numpy as np
from numpy.typing import NDArray

from mlx_trainer.data.store.store import PREFIX, MappedArray

STEP = 16
"""Prefixes are a multiple of so many tokens."""
LEAST = 32
"""Shorter ones are not worth it."""
TOGETHER = 16
"""What a prefix saves is judged for batches with so many rows of a family."""
NEARLY_ALL = 0.9
"""A longer prefix is taken where this share of a family has it in common,"""
WORTH_A_SPLIT = 1.25
"""or where it saves so many times as much."""
ROWS_AT_ONCE = 1 << 16
ODD = 0x9E3779B97F4A7C15
WEIGHTS = np.cumprod(np.full(STEP, ODD, np.uint64), dtype=np.uint64)


def find_prefixes(ids: MappedArray, starts: NDArray[np.int64], limits: NDArray[np.int32]) -> NDArray[np.void]:
    """A record of `PREFIX` for each row, (rows,); row i begins at `starts[i]`, and may share `limits[i]` tokens.

    A row that begins with some tokens of many rows and with more tokens of few is of the family that saves more, and
    of the larger one where that is hardly less: large families are dealt more freely.
    """
    found = np.zeros(len(starts), PREFIX)
    saved, members = np.zeros(len(starts)), np.zeros(len(starts))
    digests = np.zeros(len(starts), np.uint64)
    rows = np.arange(len(starts))
    for end in count(STEP, STEP):
        rows = rows[limits[rows] >= end]
        if len(rows) < 2:
            return found
        digests[rows] = added(digests[rows], ids, starts[rows] + end - STEP)
        _, inverse, counts = np.unique(digests[rows], return_inverse=True, return_counts=True)
        alike = counts[inverse]
        rows, alike = rows[alike > 1], alike[alike > 1]
        gain = end * (1 - 1 / np.minimum(alike, TOGETHER))
        together, worth = alike >= NEARLY_ALL * members[rows], gain >= WORTH_A_SPLIT * saved[rows]
        chosen = (end >= LEAST) & (gain >= saved[rows]) & (together | worth)
        better = rows[chosen]
        saved[better], members[better] = gain[chosen], alike[chosen]
        found["family"][better], found["prefix"][better] = digests[better], end
    raise AssertionError("unreachable: no row is endless")


def added(digests: NDArray[np.uint64], ids: MappedArray, starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The digests of as many rows after the next `STEP` tokens, which begin at `starts`."""
    new = np.empty_like(digests)
    for begin in range(0, len(starts), ROWS_AT_ONCE):
        part = slice(begin, begin + ROWS_AT_ONCE)
        tokens = ids.copy(starts[part, None] + np.arange(STEP)).astype(np.uint64)
        mixed = (digests[part] ^ (tokens + 1) @ WEIGHTS) * np.uint64(ODD)
        new[part] = mixed ^ mixed >> np.uint64(29)
    return new
