"""Rows that are there twice: on one side they count double, on both they make the validation loss too low."""

import logging

import numpy as np
from attrs import frozen

from mlx_trainer.data.store.rows import Rows

logger = logging.getLogger("mlx_trainer.data")


@frozen
class Leaks:
    """How many held-out rows are trained too, with the sources of the first one and of its twin."""

    count: int
    held_out: str = ""
    trained: str = ""


# numpy's `unique` and `isin` hash 64-bit integers, which takes a hundred times as long as sorting them.


def count_repeats(rows: Rows) -> int:
    """How many of `rows`, or of their pairs, have the ids and mask of an earlier one of them."""
    digests = np.sort(rows.digests)
    return int(np.count_nonzero(digests[1:] == digests[:-1]))


def find_leaks(train: Rows, held_out: Rows) -> Leaks:
    """The rows, or pairs, of `held_out` that have the ids and mask of one of `train`."""
    if not (train and held_out):
        return Leaks(0)
    trained, digests = train.digests, held_out.digests
    ascending = np.sort(trained)
    nearest = ascending[np.minimum(np.searchsorted(ascending, digests), len(ascending) - 1)]
    leaked = np.flatnonzero(nearest == digests)
    if len(leaked) == 0:
        return Leaks(0)
    first = int(leaked[0])
    twin = int(np.flatnonzero(trained == digests[first])[0])
    return Leaks(len(leaked), held_out[first * held_out.each].source, train[twin * train.each].source)


def tell_leaks(leaks: Leaks, held_out: int) -> None:
    """Warn of `leaks`, if there are any, of `held_out` rows, with the first of them."""
    if leaks.count:
        logger.warning(
            "%d of %d held-out rows are trained too, first %s, which is the same as %s: the validation loss will be "
            "too low. Take such rows out of one side",
            *(leaks.count, held_out, leaks.held_out, leaks.trained),
        )
