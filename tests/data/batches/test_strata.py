"""Rows that share a prefix are planned together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer.data.batches.loader import BatchLoader
from mlx_trainer.data.batches.mixing import Mixture
from mlx_trainer.data.batches.plan import EpochPlan, plan
from mlx_trainer.data.batches.shapes import Budget
from mlx_trainer.data.batches.strata import coarse, strata_of
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.data.store.rows import Rows
from tests.data.stores import write_store

FAMILIES = st.lists(
    st.tuples(st.integers(1, 40) | st.integers(1, 3), st.sampled_from([32, 48, 64, 160, 400]), st.integers(1, 90)),
    max_size=12,
)
BUDGETS = st.builds(Budget, rows=st.integers(1, 12), max_shapes=st.integers(1, 8), unpadded=st.just(True)) | st.builds(
    Budget, tokens=st.integers(1, 3000), max_shapes=st.integers(1, 8), unpadded=st.just(True)
)
RANKS = st.integers(1, 3)
Sharing = tuple[np.ndarray, np.ndarray, np.ndarray]


def sharing(drawn: list[tuple[int, int, int]], alone: int) -> Sharing:
    """Lengths, prefixes and families of rows: families of so many rows with such a prefix, and rows that are alone."""
    lengths, prefixes, families = [5 + 13 * i % 170 for i in range(alone)], [0] * alone, [0] * alone
    for number, (rows, prefix, spread) in enumerate(drawn, start=1):
        lengths += [prefix + 1 + (7 * i + number) % spread for i in range(rows)]
        prefixes += [prefix] * rows
        families += [number] * rows
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    return np.array(lengths, int)[order], np.array(prefixes, int)[order], np.array(families, np.uint64)[order]


def planned(seed: int, epoch: int, rows: Sharing, budget: Budget, ranks: int) -> EpochPlan:
    """The plan of rows that share."""
    return plan(seed, epoch, rows[0], budget, ranks, strata=strata_of(*rows, budget, ranks))


@given(st.integers(0, 2**40), st.integers(0, 9), FAMILIES, st.integers(0, 40), BUDGETS, RANKS)
@settings(deadline=None)
def test_a_plan_of_rows_that_share(
    seed: int, epoch: int, drawn: list[tuple[int, int, int]], alone: int, budget: Budget, ranks: int
) -> None:
    """Each row once; groups are of one family, whose prefix is no shorter; all fits; shapes are those of any epoch."""
    rows = lengths, prefixes, families = sharing(drawn, alone)
    result = planned(seed, epoch, rows, budget, ranks)
    assert sorted(result.order.tolist()) == list(range(len(lengths)))
    assert len(result) % ranks == 0
    assert len(result.shapes) <= budget.max_shapes
    for batch, shape in result:
        own = lengths[batch] - shape.prefix
        assert len(batch) <= shape.rows
        assert own.max(initial=0) <= shape.length
        assert own.min(initial=1) >= 1
        assert shape.shared + own.sum() < shape.tokens or shape.tokens == shape.cells
        if shape.prefix:
            each = shape.rows // shape.groups
            assert shape.groups * each == shape.rows
            for begin in range(0, len(batch), each):
                group = batch[begin : begin + each]
                assert len(set(families[group].tolist())) == 1
                assert (prefixes[group] >= shape.prefix).all()
        if budget.rows is not None:
            assert shape.rows <= budget.rows
    other = planned(seed + 1, epoch + 1, rows, budget, ranks)
    assert other.shapes == result.shapes
    assert np.sort(other.classes).tolist() == np.sort(result.classes).tolist()


@pytest.mark.parametrize("budget", [Budget(rows=16, unpadded=True), Budget(tokens=4096, unpadded=True)])
def test_a_system_prompt_is_computed_once_a_batch(budget: Budget) -> None:
    """Of 400 tokens and 200 own ones in each of 640 rows, a batch of r rows computes 400 + 200 r."""
    rows = sharing([(640, 400, 399)], 0)
    result = planned(0, 0, rows, budget, 1)
    computed = sum(batch.shape.tokens for batch in result)
    assert {shape.groups for shape in result.shapes} == {1}
    ideal = sum(400 + (rows[0][batch] - 400).sum() for batch, _ in result)
    assert computed < 1.04 * ideal < 0.42 * rows[0].sum()
    assert sum(result.shared_tokens) == 400 * (640 - len(result))


def test_answers_to_one_prompt_stay_together() -> None:
    """Of 300 prompts with four answers each, a batch computes each once, rounded down; of three, a pair."""
    rows = sharing([(4, 160, 80)] * 300 + [(3, 160, 80)] * 60, 10)
    result = planned(0, 0, rows, Budget(rows=16, unpadded=True), 1)
    assert {(shape.groups, shape.rows) for shape in result.shapes if shape.prefix} == {(4, 16), (8, 16)}
    assert sum(result.shared_tokens) == 128 * (300 * 3 + 60)
    assert sum(batch.shape.tokens for batch in result) < 1.05 * (rows[0].sum() - sum(result.shared_tokens))


def test_epochs_group_a_family_differently() -> None:
    """Rows that share a system prompt meet others in another epoch."""
    rows = sharing([(640, 400, 399)], 0)
    groups = [
        {frozenset(batch.rows.tolist()) for batch in planned(0, e, rows, Budget(rows=16, unpadded=True), 1)}
        for e in (0, 1)
    ]
    assert len(groups[0] & groups[1]) < 4


def test_what_saves_little_is_left_alone() -> None:
    """A pair among many long rows gets no shapes of its own."""
    assert len(strata_of(*sharing([(2, 32, 5)], 200), Budget(rows=4, unpadded=True))) == 1


def test_keys_are_a_multiple_of_the_step() -> None:
    """With rows a multiple of 128, so are prefix and row together: others end the process on CUDA."""
    rows = sharing([(640, 400, 399), *[(4, 160, 80)] * 300], 10)
    shapes = planned(0, 0, rows, Budget(rows=16, unpadded=True, length_step=128), 1).shapes
    assert {shape.prefix for shape in shapes} >= {384, 128}
    assert all(shape.prefix % 128 == 0 for shape in shapes)


def test_coarse() -> None:
    """Prefixes of units have few lengths, none longer than what is shared."""
    assert coarse(np.array([32, 47, 48, 100, 127, 400, 512, 1000])).tolist() == [32, 32, 48, 96, 96, 384, 512, 768]


def test_a_place_shares_what_all_its_rows_share() -> None:
    """Rows that take turns in a place share a prefix only where they are of one family."""
    mixture = Mixture.of(np.array([40, 41, 42, 43, 60, 61]), np.array([0, 0, 0, 0, 1, 1]), [0.5, 1.0])
    prefixes, families = np.array([32, 32, 32, 32, 48, 48]), np.array([7, 7, 7, 8, 9, 9], np.uint64)
    found = mixture.common(prefixes, families)
    assert found[0].tolist() == [32, 0, 48, 48]
    assert found[1][[0, 2, 3]].tolist() == [7, 9, 9]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
def test_batches_of_rows_that_share(tmp_path: Path, weights: tuple[float, float]) -> None:
    """The loader's batches hold each row whole: prefix and own tokens are those of the rows that they name."""
    head = list(range(100, 164))
    sources = [
        [([*head, i % 50, i, *range(i % 9)], [False] * 66 + [True] * (i % 9)) for i in range(part * 100 + 1, 160)]
        for part in (0, 1)
    ]
    stores = [write_store(tmp_path / str(i), rows, name=str(i)) for i, rows in enumerate(sources)]
    rows = Rows.of(stores)
    loader = BatchLoader(rows, Budget(rows=8), shuffle=True, seed=1, weights=weights, layout="unpadded")
    seen = 0
    for batch in loader:
        assert isinstance(batch, UnpaddedBatch)
        for row, name in enumerate(batch.metadata.rows):
            store, line = map(int, name.split(":"))
            own = batch.input_ids[batch.grid[row]]
            group = row * batch.groups // len(batch.grid)
            shared = batch.input_ids[group * batch.prefix : (group + 1) * batch.prefix]
            ids = sources[store][line - 1][0]
            assert [*shared, *own][: len(ids)] == ids
        seen += batch.metadata.shared_tokens
        assert batch.prefix in (0, 64)
    assert seen > 64 * 0.7 * len(loader) * 7
    assert loader.strata[0].once
