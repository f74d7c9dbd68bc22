"""Weights of sources."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.data.batches.mixing import Mixture, blocks_of

ROWS = st.lists(st.tuples(st.integers(2, 300), st.integers(0, 2)), min_size=1, max_size=80)
WEIGHTS = st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.7, 2.0, 3.25]), min_size=3, max_size=3)


def epoch_rows(mixture: Mixture, epoch: int, seed: int = 7) -> np.ndarray:
    """The rows of an epoch, place by place."""
    return mixture.rows(seed, epoch, np.arange(len(mixture.lengths)))


@given(ROWS, WEIGHTS, st.integers(0, 2**40), st.integers(0, 1000))
def test_each_source_has_its_share(rows: list[tuple[int, int]], weights: list[float], seed: int, epoch: int) -> None:
    """Every epoch uses weight times the rows of a source, all equally often up to one, and each fits its place."""
    lengths, source = np.array([n for n, _ in rows]), np.array([s for _, s in rows], np.uint8)
    mixture = Mixture.of(lengths, source, weights)
    used = epoch_rows(mixture, epoch, seed)
    assert (lengths[used] <= mixture.lengths).all()
    for number, weight in enumerate(weights):
        mine = np.flatnonzero(source == number)
        times = np.array([np.count_nonzero(used == row) for row in mine], int)
        share = weight - int(weight)
        assert times.sum() == len(mine) * int(weight) + len(blocks_of(len(mine), share)) - 1
        assert set(times.tolist()) <= {int(weight), int(weight) + (share > 0)}


@given(ROWS, st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_all_rows_before_any_twice(rows: list[tuple[int, int]], weight: float) -> None:
    """With a weight below one, the rows of a place take turns: over as many epochs as it has rows, each comes once."""
    lengths, source = np.array([n for n, _ in rows]), np.zeros(len(rows), np.uint8)
    mixture = Mixture.of(lengths, source, [weight])
    places = len(mixture.lengths)
    turns = np.array([epoch_rows(mixture, epoch) for epoch in range(len(rows) + 1)])
    seen = set()
    for place in range(places):
        (size,) = {int(np.flatnonzero(turns[1:, place] == turns[0, place])[0]) + 1}
        once = turns[:size, place].tolist()
        assert len(set(once)) == size
        seen |= set(once)
    assert seen == set(range(len(rows)))


def test_weights_of_one_change_nothing() -> None:
    """Where all weights are one, places are rows."""
    lengths = np.array([5, 3, 9])
    mixture = Mixture.of(lengths, np.array([0, 1, 0]), [1.0, 1.0])
    assert mixture.lengths is lengths
    assert epoch_rows(mixture, 4).tolist() == [0, 1, 2]


def test_a_weight_of_two_and_a_half() -> None:
    """Weight 2.5 of two rows: both twice, and one of them a third time, in turns."""
    mixture = Mixture.of(np.array([4, 6]), np.array([0, 0]), [2.5])
    counts = [np.bincount(epoch_rows(mixture, epoch)).tolist() for epoch in range(2)]
    assert sorted(counts) == [[2, 3], [3, 2]]


@pytest.mark.parametrize(("rows", "share", "blocks"), [(10, 0.3, 3), (10, 0.01, 1), (0, 0.5, 0), (7, 0.0, 0)])
def test_blocks(rows: int, share: float, blocks: int) -> None:
    """A share of rows, one at least where there are rows."""
    edges = blocks_of(rows, share)
    assert len(edges) == blocks + 1
    if blocks:
        assert (edges[0], edges[-1]) == (0, rows)
