"""The plan of an epoch and the split."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.data.batch import padded_length
from mlx_trainer.data.plan import plan, split

LENGTHS = st.lists(st.integers(2, 400), min_size=1, max_size=300)
SEEDS = st.integers(0, 2**40)


@given(SEEDS, st.integers(0, 50), LENGTHS, st.integers(1, 12), st.booleans())
def test_every_row_once(seed: int, epoch: int, lengths: list[int], batch_size: int, shuffle: bool) -> None:
    """Each row is in exactly one batch; all batches are full but one at the end."""
    batches = plan(seed, epoch, lengths, batch_size, shuffle)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    full, rest = divmod(len(lengths), batch_size)
    assert [len(batch) for batch in batches] == [batch_size] * full + [rest] * (rest > 0)


@given(SEEDS, LENGTHS, st.integers(1, 6))
def test_the_plan_is_a_function(seed: int, lengths: list[int], batch_size: int) -> None:
    """The same seed and epoch give the same batches, whatever was planned before."""
    first = [batch.tolist() for batch in plan(seed, 3, lengths, batch_size, True)]
    plan(seed, 2, lengths, batch_size, True)
    assert [batch.tolist() for batch in plan(seed, 3, lengths, batch_size, True)] == first


def test_epochs_group_differently() -> None:
    """Another epoch and another seed put rows together that were apart, also in small data sets."""
    for rows in (16, 1000):
        lengths = [7 * i % 391 + 2 for i in range(rows)]
        groups = [
            {frozenset(batch.tolist()) for batch in plan(seed, epoch, lengths, 4, True)}
            for seed, epoch in ((0, 0), (0, 1), (1, 0))
        ]
        assert all(len(a & b) < len(a) / 4 for i, a in enumerate(groups) for b in groups[:i])


def test_without_shuffling_rows_keep_their_order() -> None:
    """Unshuffled batches follow the order of the rows in every epoch."""
    assert [batch.tolist() for batch in plan(5, 9, [4, 3, 9, 2, 8], 2, False)] == [[0, 1], [2, 3], [4]]


def test_batches_hold_rows_of_nearly_equal_length() -> None:
    """On a chat-like spread of lengths a shuffled plan pads less than a third of what random batches pad."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.0, 0.8, 4000).astype(int) + 10, 2048)

    def padding(batches: list[np.ndarray]) -> float:
        computed = sum(len(batch) * padded_length(int(lengths[batch].max()), 2048) for batch in batches)
        return float(1 - lengths.sum() / computed)

    planned = padding(plan(0, 0, lengths.tolist(), 4, True))
    random = padding(list(np.random.default_rng(1).permutation(4000).reshape(-1, 4)))
    assert planned < 0.14
    assert random > 0.42


@given(SEEDS, st.integers(1, 200), st.floats(0.01, 1.0), st.data())
def test_split_is_disjoint_and_complete(seed: int, rows: int, train_split: float, data: st.DataObject) -> None:
    """Every kept row is on exactly one side; at least one is held out, and one trained, where two are kept."""
    kept = sorted(data.draw(st.sets(st.integers(0, rows - 1), min_size=1)))
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
    sides = [split(seed, 100, range(100), 0.9)[1].tolist() for seed in (1, 1, 2)]
    assert sides[0] == sides[1] != sides[2]
    assert len(sides[0]) == 10


def test_a_row_that_falls_out_moves_hardly_any_other() -> None:
    """When one row is taken out, at most one other row changes its side."""
    everyone = range(200)
    without = [row for row in everyone if row != 17]
    before = set(split(3, 200, everyone, 0.8)[1].tolist())
    after = {without[i] for i in split(3, 200, without, 0.8)[1].tolist()}
    assert len(before ^ after - {17}) <= 2
