"""Few lengths for many rows."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.data.batches.shapes import LENGTH_STEP, MOST_STEPS, Budget, length_classes

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


def padded(lengths: np.ndarray, classes: np.ndarray) -> int:
    """Positions of all rows, each padded to the next of `classes`."""
    return int(classes[np.searchsorted(classes, lengths)].sum())


@given(LENGTHS, st.integers(1, 4), st.integers(1, 5))
def test_no_other_classes_pad_less(lengths: list[int], most: int, fewest: int) -> None:
    """Of all choices of up to `most` lengths, each but the last for `fewest` rows, none is 0.3 % better per class."""
    given = np.array(lengths)
    classes = length_classes(given, most, lambda length: fewest)
    counts = np.bincount(np.searchsorted(classes, given), minlength=len(classes))
    assert len(classes) <= most
    assert (counts[:-1] >= fewest).all()
    assert classes[-1] >= given.max()
    steps = range(LENGTH_STEP, int(given.max()) + LENGTH_STEP, LENGTH_STEP)
    best = min(
        padded(given, np.array([*lower, steps[-1]]))
        for count in range(most)
        for lower in combinations(steps[:-1], count)
        if (np.bincount(np.searchsorted([*lower, steps[-1]], given), minlength=count + 1)[:-1] >= fewest).all()
    )
    assert best <= padded(given, classes) <= best * (1 + 0.003 * most)


def test_very_long_rows() -> None:
    """Rows of a million tokens get classes too, in coarser steps, and quickly."""
    lengths = np.array([5, 90, 1000, 1_000_000, 900_000, 17_000] * 4)
    classes = length_classes(lengths, 16, lambda length: 1)
    assert classes[-1] >= 1_000_000
    step = np.gcd.reduce(classes)
    assert step % LENGTH_STEP == 0
    assert 1_000_000 / step <= MOST_STEPS


def test_lengths_near_the_end_of_their_type() -> None:
    """Sixteen bits hold the lengths, and nothing wraps around."""
    lengths = np.array([1, 8, 9, 65_535], np.uint16)
    assert padded(lengths, length_classes(lengths, 4, lambda length: 1)) >= int(lengths.sum(dtype=np.int64))
    assert length_classes(np.array([65_535] * 3, np.uint16), 4, lambda length: 1).tolist() == [65_536]


def test_budget() -> None:
    """A budget has rows or tokens; one row at least is a batch."""
    assert [Budget(rows=3).rows_of(length) for length in (1, 5000)] == [3, 3]
    assert [Budget(tokens=100).rows_of(length) for length in (1, 33, 100, 101)] == [100, 3, 1, 1]
    for wrong in ({}, {"rows": 2, "tokens": 2}, {"rows": 0}, {"tokens": 0}, {"rows": 1, "max_shapes": 0}):
        with pytest.raises(ValueError, match=r"give either rows or tokens|must be >= 1"):
            Budget(**wrong)


def test_one_long_row_lengthens_no_other() -> None:
    """A single row far above the others has a class of its own, whatever the number that a class should have."""
    lengths = np.array([20, 21, 22, 23] * 10 + [500])
    assert length_classes(lengths, 4, lambda length: 8).tolist() == [24, 504]
