"""When each step began, was dispatched and done: a callback that reads clocks, and ends the run when it has enough."""

import logging
import time
from collections.abc import Callable, Mapping

from attrs import field, frozen

from mlx_trainer import runtime
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.callback import Callback
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer

log = logging.getLogger("mlx_trainer.benchmarking")

Clock = Callable[[], float]


@frozen
class StepTimes:
    """What the host did for one step, in seconds.

    `data` passed before it, while its batches were made; `dispatch` until the device had it, `host` of which this
    thread was computing (the rest it waited for room in the device's queue). `new_shapes` were compiled for it.
    """

    data: float
    dispatch: float
    host: float
    new_shapes: int


@frozen
class Mark:
    """Where a run stood at a moment when the device had nothing left to do."""

    time: float
    steps: int = 0
    shapes: int = 0
    counts: Mapping[str, int] = field(factory=dict)


class StepClock(Callback):
    """Reads the clocks at each step; the measured steps lie between the marks `warm` and `end`.

    The device is waited for three times more than the trainer does: after the first step, before the first measured
    one and after the last, so that the figures hold these steps, whole, and nothing else. `shapes` is how many are to
    be expected, `now` wall time, `cpu` the time for which this thread has been computing.

    Costs five clock readings a step.
    """

    def __init__(
        self, extent: Extent, shapes: int, now: Clock = time.perf_counter, cpu: Clock = time.thread_time
    ) -> None:
        self.extent, self.shapes, self.now, self.cpu = extent, shapes, now, cpu
        self.begun = self.first_start = 0.0
        self.steps: list[StepTimes] = []
        self.done: list[float] = []
        """When each step was known to be computed."""
        self.warm = self.end = Mark(0.0)

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """The run begins, and so does its peak of memory."""
        runtime.reset_peak_memory()
        self.begun = self._free = self.now()

    def on_step_start(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """The step's batches are there."""
        self._start, self._cpu = self.now(), self.cpu()
        if step == 1:
            self.first_start = self._start

    def on_step_dispatched(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """The device has the step."""
        data, dispatch, host = self._start - self._free, self.now() - self._start, self.cpu() - self._cpu
        known = sum(times.new_shapes for times in self.steps)
        self.steps.append(StepTimes(data, dispatch, host, trainer.compiled_shapes - known))

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """The step before is computed."""
        self._free = self.now()
        if len(self.done) < step - 1:
            self.done.append(self._free)
        if not self.warm.steps:
            if self._is_warm(trainer, step):
                self.warm = self._mark(trainer, step)
                log.info("warm after %d steps and %.0f s; measuring", step, self.warm.time - self.begun)
            elif step == 1:
                self._wait(trainer)
        elif self.extent.enough(step - self.warm.steps, self._free - self.warm.time):
            self.end = self._mark(trainer, step)
            trainer.request_stop("measured enough")

    def on_epoch_end(self, trainer: Trainer, module: TrainerModule, epoch: int) -> None:
        """What the trainer read here it waited for; only what comes now is spent on data."""
        self._free = self.now()

    def _is_warm(self, trainer: Trainer, step: int) -> bool:
        seen = trainer.compiled_shapes >= self.shapes
        return self.extent.warm(step, every_shape_seen=seen, epoch_over=step >= trainer.steps_per_epoch)

    def _mark(self, trainer: Trainer, step: int) -> Mark:
        self._wait(trainer)
        return Mark(self._free, step, trainer.compiled_shapes, dict(trainer.state.counts))

    def _wait(self, trainer: Trainer) -> None:
        with trainer.paused():
            self._free = self.now()
        self.done.append(self._free)
