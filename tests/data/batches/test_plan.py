"""The plan of an epoch and the split."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.data.batches.plan import EpochPlan, plan, split
from mlx_trainer.data.batches.shapes import Budget

LENGTHS = st.lists(st.integers(2, 400) | st.integers(2, 40), max_size=300).map(np.array)
SEEDS = st.integers(0, 2**40)
EPOCHS = st.integers(0, 50)
SHAPES = st.integers(1, 6)
OPTIONS = {"max_shapes": SHAPES, "unpadded": st.booleans(), "length_step": st.sampled_from([8, 8, 64])}
BUDGETS = st.builds(Budget, rows=st.integers(1, 12), **OPTIONS) | st.builds(
    Budget, tokens=st.integers(1, 2000), **OPTIONS
)
RANKS = st.integers(1, 5)


def listed(planned: EpochPlan) -> list[list[int]]:
    """The rows of each batch."""
    return [batch.rows.tolist() for batch in planned]


@given(SEEDS, EPOCHS, LENGTHS, BUDGETS, RANKS, st.booleans())
def test_every_row_once(seed: int, epoch: int, lengths: np.ndarray, budget: Budget, ranks: int, shuffle: bool) -> None:
    """The batches one behind the other hold every row exactly once, and each rank has as many as the others."""
    planned = plan(seed, epoch, lengths, budget, ranks, shuffle=shuffle)
    assert sorted(row for batch in planned for row in batch.rows.tolist()) == list(range(len(lengths)))
    assert len(planned) % ranks == 0
    if not shuffle and ranks == 1:
        assert [row for batch in listed(planned) for row in batch] == list(range(len(lengths)))


@given(SEEDS, EPOCHS, LENGTHS, BUDGETS, RANKS, st.booleans())
def test_batches_fit_their_shapes(
    seed: int, epoch: int, lengths: np.ndarray, budget: Budget, ranks: int, shuffle: bool
) -> None:
    """No batch has more rows, a longer row or more tokens than its shape, and shapes are few and within the budget."""
    planned = plan(seed, epoch, lengths, budget, ranks, shuffle=shuffle)
    for rows, shape in planned:
        assert len(rows) <= shape.rows
        assert lengths[rows].max(initial=0) <= shape.length
        assert lengths[rows].sum() <= shape.tokens <= shape.rows * shape.length
        if budget.tokens is not None and not budget.unpadded:
            assert shape.rows == 1 or shape.rows * shape.length <= budget.tokens
        if budget.tokens is not None and budget.unpadded and shuffle:
            assert shape.rows <= max(budget.tokens // shape.length, 1) or shape.tokens <= budget.tokens + 16
        assert shape.tokens > lengths[rows].sum() or shape.tokens == shape.rows * shape.length
    assert len(planned.shapes) <= budget.max_shapes
    assert len({batch.shape for batch in planned}) <= budget.max_shapes


@given(SEEDS, EPOCHS, LENGTHS, BUDGETS, RANKS)
def test_the_shapes_are_those_of_every_epoch(
    seed: int, epoch: int, lengths: np.ndarray, budget: Budget, ranks: int
) -> None:
    """Another seed and another epoch have as many batches of each shape, so what is told of epoch 0 stays true."""
    first, other = plan(0, 0, lengths, budget, ranks), plan(seed, epoch, lengths, budget, ranks)
    assert first.shapes == other.shapes
    assert np.sort(first.classes).tolist() == np.sort(other.classes).tolist()


@given(SEEDS, LENGTHS, BUDGETS, RANKS)
def test_the_plan_is_a_function(seed: int, lengths: np.ndarray, budget: Budget, ranks: int) -> None:
    """The same seed and epoch give the same batches, whatever was planned before and in which type lengths come."""
    first = listed(plan(seed, 3, lengths, budget, ranks))
    np.random.seed(1)
    plan(seed, 2, lengths, budget, ranks)
    assert listed(plan(seed, 3, lengths.astype(np.int32), budget, ranks)) == first


@given(LENGTHS, BUDGETS, st.integers(2, 5))
def test_ranks_share_the_work(lengths: np.ndarray, budget: Budget, ranks: int) -> None:
    """In each round all ranks have batches of one shape, and rows are spread as evenly as can be."""
    planned = plan(1, 0, lengths, budget, ranks)
    for start in range(0, len(planned), ranks):
        batches = planned[start : start + ranks]
        assert len({batch.shape for batch in batches}) == 1
        sizes = [len(batch.rows) for batch in batches]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("budget", [Budget(rows=4), Budget(tokens=900)])
@pytest.mark.parametrize("rows", [16, 1000])
def test_epochs_group_differently(rows: int, budget: Budget) -> None:
    """Another epoch and another seed put rows together that were apart, also in small data sets."""
    lengths = np.array([7 * i % 391 + 2 for i in range(rows)])
    groups = [
        {frozenset(batch) for batch in listed(plan(seed, epoch, lengths, budget))}
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert all(len(a & b) < len(a) / 4 for i, a in enumerate(groups) for b in groups[:i])


def test_each_row_comes_early_and_late() -> None:
    """Over the epochs a long row, like a short one, stands anywhere in the order of batches."""
    lengths = np.array([10 * (i % 40) + 5 for i in range(400)])
    for row in (0, 39):
        places = []
        for epoch in range(60):
            planned = plan(0, epoch, lengths, Budget(rows=4))
            (place,) = [i for i, batch in enumerate(planned) if row in batch.rows]
            places.append(place / len(planned))
        assert min(places) < 0.15
        assert max(places) > 0.85
        assert 0.35 < np.mean(places) < 0.65


def chat_lengths(rows: int) -> np.ndarray:
    """Lengths as chats have them: log-normal, median 198."""
    return np.minimum(np.random.default_rng(0).lognormal(5.29, 0.76, rows).astype(int) + 2, 1536)


@pytest.mark.parametrize("budget", [Budget(rows=16), Budget(tokens=8192)])
def test_little_is_padded(budget: Budget) -> None:
    """With 16 shapes a padded epoch computes 1.11 positions for each token, an unpadded one 1.02 with its 8."""
    lengths = chat_lengths(20_000)
    padded = sum(batch.shape.rows * batch.shape.length for batch in plan(0, 0, lengths, budget))
    few = Budget(rows=budget.rows, tokens=budget.tokens, max_shapes=8, unpadded=True)
    unpadded = sum(batch.shape.tokens for batch in plan(0, 0, lengths, few))
    assert padded / lengths.sum() < 1.11
    assert unpadded / lengths.sum() < 1.02


@given(SEEDS, st.integers(1, 200), st.floats(0.01, 1.0), st.data())
def test_split_is_disjoint_and_complete(seed: int, rows: int, train_split: float, data: st.DataObject) -> None:
    """Every kept row is on exactly one side; at least one is held out, and one trained, where two are kept."""
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1))))
    train, validation = split(seed, rows, kept, train_split)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(kept)))
    assert len(train) >= 1
    if train_split == 1.0:
        assert len(validation) == 0
    elif len(kept) >= 2:
        assert abs(len(validation) - len(kept) * (1 - train_split)) <= 1
        assert len(validation) >= 1


def test_split_by_seed() -> None:
    """The same seed holds out the same rows, another one others."""
    sides = [split(seed, 100, np.arange(100), 0.9)[1].tolist() for seed in (1, 1, 2)]
    assert sides[0] == sides[1] != sides[2]
    assert len(sides[0]) == 10


def test_a_row_that_falls_out_moves_hardly_any_other() -> None:
    """When one row is taken out, at most one other row changes its side."""
    everyone = np.arange(200)
    without = np.delete(everyone, 17)
    before = set(split(3, 200, everyone, 0.8)[1].tolist())
    after = set(without[split(3, 200, without, 0.8)[1]].tolist())
    assert len(before ^ after - {17}) <= 2
