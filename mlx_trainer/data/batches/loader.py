"""Batches in the order of the plan, from any position of any epoch."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property
from hashlib import sha256
from itertools import islice
from typing import Literal

import numpy as np
from attrs import evolve

from mlx_trainer import runtime
from mlx_trainer.data.batches.classes import TOKEN_STEP
from mlx_trainer.data.batches.mixing import Mixture
from mlx_trainer.data.batches.padded import Batch, collate
from mlx_trainer.data.batches.pairs import pair_strata, referred
from mlx_trainer.data.batches.plan import EpochPlan, PlannedBatch, plan, starts_of
from mlx_trainer.data.batches.shapes import Budget, Lengths, Shape, round_up
from mlx_trainer.data.batches.strata import Indices, Stratum, plain, strata_of
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.data.encoding.tokenizer import FloatArray
from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.store.rows import Rows
from mlx_trainer.data.store.store import TokenRow

AHEAD_PER_WORKER = 2
BatchLayout = Literal["padded", "unpadded"]


class BatchLoader:
    """Iterates the current epoch from the current position; when exhausted it stands at the start of the next.

    Args:
        rows: the rows; where they are pairs, both rows of a pair are in one batch, one behind the other.
        budget: how large a batch is, and how many shapes there may be; its rows are pairs then.
        weights: how many times each row is used in an epoch, for each of the stores that `rows` are from.
        shuffle: a new order every epoch; else the order of `rows`.
        layout: "padded" batches, or "unpadded" ones.
        workers: threads that prepare batches ahead, 0 for none. Threads, because a forked process cannot use MLX.
        resumable: False makes every iteration start at the first batch of epoch 0, as validation needs it.
        ranks: so many processes train together, and this one is number `rank` of them.
        recipe: what made tokens of the rows, by name, for `fingerprint`.
        reference: log-probability of each row's answer under a reference, (rows,), which batches then have too.
    """

    def __init__(
        self,
        rows: Rows,
        budget: Budget,
        *,
        shuffle: bool,
        seed: int,
        weights: Sequence[float] = (),
        layout: BatchLayout = "padded",
        pad_id: int = 0,
        workers: int = 0,
        resumable: bool = True,
        rank: int = 0,
        ranks: int = 1,
        recipe: Mapping[str, object] | None = None,
        reference: FloatArray | None = None,
    ) -> None:
        self.rows, self.reference = rows, reference
        self.recipe = dict(recipe or {})
        self.budget = budget if layout == "padded" else unpadded_budget(budget)
        self.shuffle = shuffle
        self.seed = seed
        self.layout = layout
        self.pad_id = pad_id
        self.workers = workers
        self.resumable = resumable
        self.rank, self.ranks = rank, ranks
        self.weights = list(weights or [1.0] * len(rows.stores))
        units = rows.lengths.reshape(-1, rows.each).sum(axis=1)
        self._mixture = Mixture.of(units, rows.store_numbers[:: rows.each], self.weights)
        in_rows = None if self.budget.rows is None else self.budget.rows * rows.each
        self._row_budget = evolve(self.budget, rows=in_rows)
        self._planned: tuple[int, EpochPlan] | None = None
        self._epoch = 0
        self._position = 0

    def __len__(self) -> int:
        """Batches in a whole epoch, the same in all epochs."""
        return len(self.plan(0) if self._planned is None else self._planned[1]) // self.ranks

    def __iter__(self) -> Iterator[Batch | UnpaddedBatch]:
        if not self.resumable:
            self._epoch = self._position = 0
        todo = range(self._position, len(self))
        with closing(self._batches(self._epoch, todo)) as batches:
            for batch in batches:
                self._position += 1
                yield batch
        self._epoch, self._position = self._epoch + 1, 0

    def plan(self, epoch: int) -> EpochPlan:
        """The batches of `epoch`, of all ranks, as arrays of places; `row_numbers` tells which rows stand there."""
        if self._planned is None or self._planned[0] != epoch:
            lengths, budget = self._mixture.lengths, self._row_budget
            planned = plan(self.seed, epoch, lengths, budget, self.ranks, shuffle=self.shuffle, strata=self.strata)
            self._planned = epoch, planned
        return self._planned[1]

    def row_numbers(self, epoch: int, places: Indices) -> Indices:
        """The numbers of the rows in `places` of a plan."""
        each = self.rows.each
        return self._mixture.rows(self.seed, epoch, places // each) * each + places % each

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

    def fingerprint(self) -> dict[str, object]:
        """All that decides on the batches, by name: for each source the digest of its rows' tokens, in order.

        The rows' own digests are in the store, so this costs a millisecond for 100,000 of them.
        """
        digests, source = self.rows.column("digest"), self.rows.store_numbers
        dataset = {
            f"dataset/{store.source}": f"{len(own)} rows {sha256(own.tobytes()).hexdigest()[:16]}"
            for number, store in enumerate(self.rows.stores)
            if len(own := digests[source == number])
        }
        budget, settings = self.budget, {"shuffle": self.shuffle, "data_seed": self.seed, "weights": self.weights}
        size = {"batch_size": budget.rows, "batch_tokens": budget.tokens, "max_shapes": budget.max_shapes}
        told = {} if self.reference is None else {"reference": sha256(self.reference.tobytes()).hexdigest()[:16]}
        return {**dataset, **self.recipe, **size, **settings, "layout": self.layout, **told}

    def batch(self, epoch: int, planned: PlannedBatch) -> Batch | UnpaddedBatch:
        """A planned batch with its rows, and their reference if there is one."""
        rows = self.rows_of(epoch, planned)
        batch: Batch | UnpaddedBatch
        if self.layout == "padded":
            batch = collate(rows, planned.shape, pad_id=self.pad_id)
        else:
            batch = collate_unpadded(rows, planned.shape, self.predictions[planned.shape], pad_id=self.pad_id)
        if self.reference is None:
            return batch
        return referred(batch, self.reference[self.row_numbers(epoch, planned.rows)])

    def rows_of(self, epoch: int, planned: PlannedBatch) -> list[TokenRow]:
        """The rows of a planned batch, in its order."""
        return [self.rows[i] for i in self.row_numbers(epoch, planned.rows).tolist()]

    def of_each_shape(self) -> Iterator[Batch | UnpaddedBatch]:
        """One batch of each class of shapes, the first of epoch 0; the position stays as it is.

        Of padded ones without those that another has room for: whoever asks wants to know what the largest need.
        """
        planned = self.plan(0)
        classes, firsts = np.unique(planned.classes, return_index=True)
        shapes = [planned.shapes[number] for number in classes]
        padded = self.layout == "padded"
        largest = [not (padded and any(other.has_room_for(shape) for other in shapes)) for shape in shapes]
        return (self.batch(0, planned[i]) for i in firsts[largest].tolist())

    @property
    def shapes(self) -> int:
        """How many distinct shapes the batches of epoch 0 have."""
        planned = self.plan(0)
        if self.layout == "padded":
            return len(np.unique(planned.classes))
        sums = self._trained_tokens(planned)
        room = np.array([self.predictions[shape] for shape in planned.shapes])
        return len(set(zip(planned.classes.tolist(), (sums <= room[planned.classes]).tolist(), strict=True)))

    @cached_property
    def strata(self) -> tuple[Stratum, ...]:
        """Which rows are planned together because they share a prefix; padded batches and a fixed order share none."""
        mixture, share = self._mixture, self.layout == "unpadded" and self.shuffle
        if self.rows.each == 2:
            return pair_strata(self.rows, mixture, self._row_budget, self.ranks, share=share)
        if not share:
            return (plain(mixture.lengths),)
        prefixes, families = mixture.common(self.rows.column("prefix"), self.rows.column("family"))
        return strata_of(mixture.lengths, prefixes, families, self.budget, self.ranks)

    @cached_property
    def predictions(self) -> Mapping[Shape, int]:
        """How many predictions the unpadded batches of each shape have room for.

        A tenth more than any batch of epoch 0 needs, so that hardly a batch of any other epoch needs more.
        """
        planned = self.plan(0)
        sums = self._trained_tokens(planned)
        most = {shape: int(sums[planned.classes == k].max(initial=1)) for k, shape in enumerate(planned.shapes)}
        return {
            shape: min(round_up(count * 11 // 10 + 1, TOKEN_STEP), shape.tokens + 1) for shape, count in most.items()
        }

    def _trained_tokens(self, planned: EpochPlan) -> Lengths:
        trained = self.rows.column("trained")[self.row_numbers(0, planned.order)]
        return np.diff(starts_of(trained)[planned.starts])

    def _batches(self, epoch: int, todo: range) -> Generator[Batch | UnpaddedBatch, None, None]:
        planned = self.plan(epoch)
        mine = (planned[self.ranks * i + self.rank] for i in todo)
        return self._prepared_ahead(epoch, mine) if self.workers else (self.batch(epoch, one) for one in mine)

    def _prepared_ahead(self, epoch: int, todo: Iterator[PlannedBatch]) -> Generator[Batch | UnpaddedBatch, None, None]:
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="mlx-trainer-data")
        try:
            ahead: deque[Future[Batch | UnpaddedBatch]] = deque(
                pool.submit(self.batch, epoch, one) for one in islice(todo, AHEAD_PER_WORKER * self.workers)
            )
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(self.batch, epoch, one) for one in islice(todo, 1))
                yield batch
        finally:
            pool.shutdown(cancel_futures=True)


def unpadded_budget(budget: Budget) -> Budget:
    """`budget` for unpadded batches, whose lengths are those of attention alone.

    A class of them has up to two shapes: one for the usual number of predictions, one for any.
    """
    step = runtime.attention_step()
    return evolve(budget, unpadded=True, length_step=step, max_shapes=max(budget.max_shapes // 2, 1))
