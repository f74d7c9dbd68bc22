"""The clock of mlx-lm's trainer: it stands where the trainer takes its batches."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import asdict, frozen

from mlx_trainer.benchmarking.clock import Clock, Mark
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.figures import Epoch, Speed, StepMs, epoch, speed, step_ms


@frozen
class PeerReport:
    """What is compared; a step is an update, an epoch's steps are batches. `first_step_s`: since the process began."""

    speed: Speed
    step_ms: StepMs
    epoch: Epoch
    peak_gb: float
    longest_seen: bool
    first_step_s: float

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


class PeerClock:
    """Hands mlx-lm's batches to its trainer, which takes one when the one before is computed, and reads the clock then.

    `begun` is when the process began, on the scale of `now`.
    """

    def __init__(
        self,
        extent: Extent,
        rows: Sequence[Any],
        batch_size: int,
        accumulate: int,
        begun: float,
        now: Clock = time.perf_counter,
    ) -> None:
        self.extent, self.accumulate, self.begun, self.now = extent, accumulate, begun, now
        self.epoch_batches = len(rows) // batch_size
        # Its batches are rows in their order, as wide as the longest of them; those left over are dropped.
        batches = (rows[first : first + batch_size] for first in range(0, self.epoch_batches * batch_size, batch_size))
        longest = [max(len(ids) for ids, _ in batch) for batch in batches]
        self.longest = max(longest)
        widths = {-(-length // 32) for length in longest}
        self.variants = len(widths) * min(accumulate, 3)
        """mlx-lm compiles a width anew for the first, the middle and the last batch of an update."""
        self.done: list[float] = []
        self.counts: Counter[str] = Counter()
        self.warm = self.end = Mark(0.0)
        self._seen: set[tuple[int, bool, bool]] = set()

    def batches(self, dataset: Any, batch_size: int, max_seq_length: int, **more: Any) -> Iterator[Any]:
        """What `mlx_lm.tuner.trainer.iterate_batches` yields, until enough was measured."""
        from mlx_lm.tuner.trainer import iterate_batches

        self.started = self.now()
        taken = iterate_batches(dataset, batch_size, max_seq_length, **more)  # type: ignore[no-untyped-call]
        for batch, lengths in taken:
            yield batch, lengths
            self.done.append(self.now())
            self._count(batch.shape, lengths.tolist())
            if len(self.done) % self.accumulate == 0 and self._update_done():
                return

    def report(self, peak_gb: float) -> PeerReport:
        """The figures."""
        used = {name: count - self.warm.counts[name] for name, count in self.end.counts.items()}
        updates, spent = self.end.steps - self.warm.steps, self.end.time - self.warm.time
        done = self.done[self.accumulate - 1 :: self.accumulate]
        return PeerReport(
            speed=speed(updates, spent, used),
            step_ms=step_ms(self.warm.time, done[self.warm.steps : self.end.steps]),
            epoch=epoch(self.started, self.done, self.epoch_batches, spent / updates / self.accumulate),
            peak_gb=peak_gb,
            longest_seen=max(width for width, *_ in self._seen) >= self.longest,
            first_step_s=done[0] - self.begun,
        )

    def _count(self, shape: Sequence[int], lengths: Sequence[Sequence[int]]) -> None:
        rows, width = shape
        place = (len(self.done) - 1) % self.accumulate
        self._seen.add((width, place == 0, place == self.accumulate - 1))
        self.counts["rows"] += rows
        self.counts["tokens"] += sum(length for _, length in lengths)
        self.counts["trained_tokens"] += sum(length - masked for masked, length in lengths)
        self.counts["positions"] += rows * (width - 1)  # the last one is only a target

    def _update_done(self) -> bool:
        """Whether that update was the last one to be measured."""
        batches = len(self.done)
        mark = Mark(self.done[-1], batches // self.accumulate, len(self._seen), dict(self.counts))
        if not self.warm.steps:
            seen, over = len(self._seen) >= self.variants, batches >= self.epoch_batches
            if self.extent.warm(mark.steps, every_shape_seen=seen, epoch_over=over):
                self.warm = mark
        elif self.extent.enough(mark.steps - self.warm.steps, mark.time - self.warm.time):
            self.end = mark
            return True
        return False
