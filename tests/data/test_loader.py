"""Loaders: positions, resuming, threads."""

import threading
from itertools import islice

import numpy as np
import pytest

from mlx_trainer.data.batch import Batch
from mlx_trainer.data.conversation import DataError
from mlx_trainer.data.loader import BatchLoader
from mlx_trainer.data.rows import TokenRow


def rows(count: int) -> list[TokenRow]:
    """Rows of distinct ids and uneven lengths."""
    lengths = [5 + 37 * i % 90 for i in range(count)]
    return [
        TokenRow(f"chats.jsonl:{i + 1}", i, np.arange(n, dtype=np.int32) + 100 * i, np.arange(n) > 2)
        for i, n in enumerate(lengths)
    ]


def loader(count: int = 23, *, shuffle: bool = True, workers: int = 0, resumable: bool = True) -> BatchLoader:
    """A loader of `count` rows, four in a batch."""
    return BatchLoader(
        rows(count),
        batch_size=4,
        max_seq_length=128,
        shuffle=shuffle,
        seed=7,
        workers=workers,
        resumable=resumable,
    )


def content(batch: Batch) -> tuple[object, ...]:
    """Everything in a batch, comparable."""
    return batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.labels.tolist(), batch.metadata


def contents(loader: BatchLoader) -> list[tuple[object, ...]]:
    """Everything in the batches of one iteration."""
    return [content(batch) for batch in loader]


def data_threads() -> list[str]:
    """Names of the running threads that prepare batches."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("mlx-trainer-data")]


def test_epochs_follow_each_other() -> None:
    """An epoch has every row once; the next iteration is the next epoch, in another order."""
    loaded = loader()
    first, second = contents(loaded), contents(loaded)
    assert len(first) == len(second) == len(loaded) == 6
    assert first != second
    sources = sorted(source for batch in loader() for source in batch.metadata.rows)
    assert sources == sorted(row.source for row in rows(23))
    assert loaded.state_dict() == {"epoch": 2, "position": 0}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", range(7))
def test_resuming_continues_exactly(consumed: int, workers: int) -> None:
    """A loader given the state after k batches yields what the first would have yielded, into the next epoch."""
    first = loader(workers=workers)
    iterator = iter(first)
    list(islice(iterator, consumed))
    state = first.state_dict()
    assert state == {"epoch": 0, "position": consumed}
    second = loader(workers=workers)
    second.load_state_dict(state)
    assert contents(second) == [content(batch) for batch in iterator]
    assert contents(second) == contents(first)


def test_a_break_keeps_the_position() -> None:
    """After leaving an iteration early the next one continues the same epoch."""
    whole, parted = contents(loader()), loader()
    start = [content(batch) for batch in islice(parted, 2)]
    assert start + contents(parted) == whole


def test_a_position_of_other_data_is_refused() -> None:
    """A state beyond the epoch's end is refused with what would be right."""
    with pytest.raises(DataError, match="Cannot continue at batch 7 of epoch 1: an epoch has 6 batches here"):
        loader().load_state_dict({"epoch": 1, "position": 7})


def test_validation_starts_over_every_time() -> None:
    """A loader that is not resumable gives the same batches on every iteration, also after a break."""
    fixed = loader(shuffle=False, resumable=False)
    whole = contents(fixed)
    next(iter(fixed))
    assert contents(fixed) == whole == contents(loader(shuffle=False))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int) -> None:
    """Batches prepared ahead in threads equal those prepared in turn, and no thread is left."""
    plain, threaded = loader(), loader(workers=workers)
    for _ in range(3):
        assert contents(threaded) == contents(plain)
    assert data_threads() == []


def test_workers_prepare_ahead_and_end_with_the_iteration() -> None:
    """While batches are consumed threads run, and closing early leaves none; the position is the consumer's."""
    threaded = loader(workers=2)
    iterator = iter(threaded)
    next(iterator)
    assert data_threads() != []
    assert threaded.state_dict() == {"epoch": 0, "position": 1}
    del iterator
    assert data_threads() == []
    assert threaded.state_dict() == {"epoch": 0, "position": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_consumer(workers: int) -> None:
    """An error while a batch is prepared is raised where the batch is asked for, and no thread is left."""
    broken = loader(shuffle=False, workers=workers)
    broken.rows[9].ids.resize(500, refcheck=False)
    with pytest.raises(ValueError, match="broadcast"):
        contents(broken)
    assert broken.state_dict() == {"epoch": 0, "position": 2}
    assert data_threads() == []
