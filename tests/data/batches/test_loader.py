"""Loaders: positions, resuming, threads, ranks, weights."""

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_trainer.data.batches.loader import BatchLoader
from mlx_trainer.data.batches.padded import Batch
from mlx_trainer.data.batches.shapes import Budget
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.store.rows import Rows
from tests.data.stores import distinct_rows, rows_of, write_store

LENGTHS = [5 + 37 * i % 90 for i in range(23)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Rows of distinct ids and uneven lengths."""
    return rows_of(tmp_path_factory.mktemp("store"), LENGTHS)


def loader(rows: Rows, **options: Any) -> BatchLoader:
    """A loader of `rows`, four in a batch."""
    return BatchLoader(rows, **{"budget": Budget(rows=4), "shuffle": True, "seed": 7, **options})


def content(batch: Batch | UnpaddedBatch) -> list[object]:
    """Everything in a batch, comparable."""
    return [value.tolist() if isinstance(value, np.ndarray) else value for value in vars_of(batch)]


def vars_of(batch: Batch | UnpaddedBatch) -> list[object]:
    """The values of all fields."""
    return [getattr(batch, name) for name in type(batch).__slots__ if not name.startswith("__")]


def contents(loader: BatchLoader) -> list[list[object]]:
    """Everything in the batches of one iteration."""
    return [content(batch) for batch in loader]


def sources(batches: BatchLoader) -> list[str]:
    """The sources of all rows of one iteration."""
    return [source for batch in batches for source in batch.metadata.rows]


def data_threads() -> list[str]:
    """Names of the running threads that prepare batches."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mlx-trainer-data")]


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
def test_epochs_follow_each_other(rows: Rows, layout: str) -> None:
    """An epoch has every row once; the next iteration is the next epoch, in another order."""
    loaded = loader(rows, layout=layout)
    first, second = contents(loaded), contents(loaded)
    assert len(first) == len(second) == len(loaded) == 6
    assert first != second
    assert sorted(sources(loader(rows, layout=layout))) == sorted(f"chats.jsonl:{i + 1}" for i in range(23))
    assert loaded.state_dict() == {"epoch": 2, "position": 0}


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", range(7))
def test_resuming_continues_exactly(rows: Rows, consumed: int, workers: int, layout: str) -> None:
    """A loader given the state after k batches yields what the first would have yielded, into the next epoch."""
    first = loader(rows, workers=workers, layout=layout)
    iterator = iter(first)
    list(islice(iterator, consumed))
    state = first.state_dict()
    assert state == {"epoch": 0, "position": consumed}
    second = loader(rows, workers=workers, layout=layout)
    second.load_state_dict(state)
    assert contents(second) == [content(batch) for batch in iterator]
    assert contents(second) == contents(first)


def test_a_break_keeps_the_position(rows: Rows) -> None:
    """After leaving an iteration early the next one continues the same epoch."""
    whole, parted = contents(loader(rows)), loader(rows)
    start = [content(batch) for batch in islice(parted, 2)]
    assert start + contents(parted) == whole


def test_a_position_of_other_data_is_refused(rows: Rows) -> None:
    """A state beyond the epoch's end is refused with what would be right."""
    with pytest.raises(DataError, match="Cannot continue at batch 7 of epoch 1: an epoch has 6 batches here"):
        loader(rows).load_state_dict({"epoch": 1, "position": 7})


def test_validation_starts_over_every_time(rows: Rows) -> None:
    """A loader that is not resumable gives the same batches on every iteration, also after a break."""
    fixed = loader(rows, shuffle=False, resumable=False)
    whole = contents(fixed)
    next(iter(fixed))
    assert contents(fixed) == whole == contents(loader(rows, shuffle=False))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(rows: Rows, workers: int) -> None:
    """Batches prepared ahead in threads equal those prepared in turn, and no thread is left."""
    plain, threaded = loader(rows), loader(rows, workers=workers)
    for _ in range(3):
        assert contents(threaded) == contents(plain)
    assert data_threads() == []


def test_workers_prepare_ahead_and_end_with_the_iteration(rows: Rows) -> None:
    """While batches are consumed threads run, and closing early leaves none; the position is the consumer's."""
    threaded = loader(rows, workers=2)
    iterator = iter(threaded)
    next(iterator)
    assert data_threads() != []
    assert threaded.state_dict() == {"epoch": 0, "position": 1}
    del iterator
    assert data_threads() == []
    assert threaded.state_dict() == {"epoch": 0, "position": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_consumer(tmp_path: Path, workers: int) -> None:
    """A damaged row is told where its batch is asked for, and no thread is left."""
    broken = loader(rows_of(tmp_path, LENGTHS), shuffle=False, workers=workers)
    data = (tmp_path / "trained.bin").read_bytes()
    begin = sum(LENGTHS[:9])
    (tmp_path / "trained.bin").write_bytes(data[:begin] + b"\1" + data[begin + 1 :])
    with pytest.raises(DataError, match=r"damaged at chats\.jsonl:10"):
        contents(broken)
    assert broken.state_dict() == {"epoch": 0, "position": 2}
    assert data_threads() == []


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_an_epoch(rows: Rows, ranks: int) -> None:
    """Each rank has as many batches as the others, and together they have every row once."""
    loaders = [loader(rows, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(each) for each in loaders}) == 1
    assert [len(contents(each)) for each in loaders] == [len(loaders[0])] * ranks
    assert sorted(source for each in loaders for source in sources(loader(rows, rank=each.rank, ranks=ranks))) == (
        sorted(f"chats.jsonl:{i + 1}" for i in range(23))
    )


def test_weights(tmp_path: Path) -> None:
    """A source of weight 2 gives each row twice, one of weight 0.5 half of its rows, the others in the next epoch."""
    stores = [write_store(tmp_path / name, distinct_rows(LENGTHS[:8]), name) for name in ("a", "b")]
    mixed = loader(Rows.of(stores), weights=[2.0, 0.5])
    epochs = [sources(mixed), sources(mixed)]
    for epoch in epochs:
        assert sorted(s for s in epoch if s.startswith("a")) == sorted([f"a:{i + 1}" for i in range(8)] * 2)
    halves = [{s for s in epoch if s.startswith("b")} for epoch in epochs]
    assert [len(half) for half in halves] == [4, 4]
    assert halves[0] | halves[1] == {f"b:{i + 1}" for i in range(8)}


def test_shapes_are_told_ahead(rows: Rows) -> None:
    """The number of shapes is that of the batches, in either layout and within the budget."""
    for layout, options in (("padded", {}), ("unpadded", {}), ("unpadded", {"budget": Budget(tokens=300)})):
        loaded = loader(rows, layout=layout, **options)
        shapes = {
            tuple(np.shape(value) for value in vars_of(batch)) for batch in loader(rows, layout=layout, **options)
        }
        assert loaded.shapes == len({shape[:-1] for shape in shapes}) <= 16


def test_unpadded_batches_have_two_shapes_a_class(tmp_path: Path) -> None:
    """Over many epochs, unpadded batches have at most two shapes of each class: usual predictions, or any."""
    answers = [([1] * 20, [k > 17 - 15 * (i % 7 == 0) for k in range(20)]) for i in range(43)]
    uneven = Rows.of([write_store(tmp_path, answers)])
    loaded = loader(uneven, layout="unpadded", budget=Budget(rows=4, max_shapes=2))
    shapes = {(batch.input_ids.shape, batch.targets.shape) for _ in range(20) for batch in loaded}
    assert len(shapes) == 2


def test_padded_shapes_that_another_has_room_for_are_left_out(rows: Rows) -> None:
    """Of batches in tokens the long ones have fewer rows: each number of rows is told once, with its longest."""
    batches = loader(rows, budget=Budget(tokens=128), layout="padded")
    assert {batch.input_ids.shape for batch in batches} == {(1, 96), (1, 80), (2, 64), (2, 48), (4, 32)}
    assert sorted(batch.input_ids.shape for batch in batches.of_each_shape()) == [(1, 96), (2, 64), (4, 32)]
