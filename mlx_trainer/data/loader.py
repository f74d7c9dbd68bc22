"""Batches in the order of the plan, from any position of any epoch."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice

from mlx_trainer.data.batch import Batch, collate
from mlx_trainer.data.conversation import DataError
from mlx_trainer.data.plan import Indices, plan
from mlx_trainer.data.rows import TokenRow

AHEAD_PER_WORKER = 2


class BatchLoader:
    """Iterates the current epoch from the current position; when exhausted it stands at the start of the next.

    Args:
        rows: the rows, none longer than `max_seq_length`.
        shuffle: a new order every epoch; else the order of `rows`.
        workers: threads that prepare batches ahead, 0 for none. Threads, because a forked process cannot use MLX.
        resumable: False makes every iteration start at the first batch of epoch 0, as validation needs it.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        *,
        batch_size: int,
        max_seq_length: int,
        shuffle: bool,
        seed: int,
        pad_id: int = 0,
        workers: int = 0,
        resumable: bool = True,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.max_seq_length = max_seq_length
        self.shuffle = shuffle
        self.seed = seed
        self.pad_id = pad_id
        self.workers = workers
        self.resumable = resumable
        self._lengths = [len(row) for row in rows]
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if not self.resumable:
            self._epoch = self._position = 0
        todo = self.plan(self._epoch)[self._position :]
        with closing(self._batches(todo)) as batches:
            for batch in batches:
                self._position += 1
                yield batch
        self._epoch, self._position = self._epoch + 1, 0

    def plan(self, epoch: int) -> list[Indices]:
        """The batches of `epoch` as arrays of indices into `rows`."""
        return plan(self.seed, epoch, self._lengths, self.batch_size, self.shuffle)

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its batches were handed over; batches prepared ahead do not count.

        After the last batch the position is `len(loader)` until the iteration ends, which starts the next epoch.
        """
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken; raises DataError where this loader has no such position."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position <= len(self):
            raise DataError(
                f"Cannot continue at batch {position} of epoch {epoch}: an epoch has {len(self)} batches here. "
                "Resume with the data, batch_size and split of the run that was interrupted."
            )
        self._epoch, self._position = epoch, position

    def batch(self, indices: Indices) -> Batch:
        """The batch of the rows at `indices`."""
        rows = [self.rows[i] for i in indices]
        return collate(rows, max_seq_length=self.max_seq_length, pad_id=self.pad_id)

    def _batches(self, todo: Sequence[Indices]) -> Generator[Batch, None, None]:
        return self._prepared_ahead(todo) if self.workers else (self.batch(indices) for indices in todo)

    def _prepared_ahead(self, todo: Sequence[Indices]) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mlx-trainer-data")
        waiting = iter(todo)
        try:
            ahead: deque[Future[Batch]] = deque(
                pool.submit(self.batch, indices) for indices in islice(waiting, AHEAD_PER_WORKER * self.workers)
            )
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.batch, indices) for indices in islice(waiting, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)
