"""The Trainer: one fixed loop, the same for every model. The timeline it follows is in `callback.py`."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import attrs
import mlx.core as mx

from mlx_trainer import loaders
from mlx_trainer.callback import Callback, Events
from mlx_trainer.evaluation import EvalMetrics, EvaluationStep, Metric, evaluating
from mlx_trainer.interruption import Interrupted, stopping_on_signals
from mlx_trainer.interval import LogInterval, StepRecord
from mlx_trainer.limits import Limits
from mlx_trainer.loaders import DataSource, Loader
from mlx_trainer.module import TrainerModule
from mlx_trainer.saves import Saves
from mlx_trainer.snapshot import Snapshot
from mlx_trainer.state import TrainingState
from mlx_trainer.step import StepOutput, TrainStep
from mlx_trainer.traced import from_tree, to_tree

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on, for instance because its numbers stay non-finite."""


@attrs.frozen
class TrainingResult:
    """How a run ended."""

    steps: int
    epochs: int
    """Epochs completed."""
    stop_reason: str
    seconds: float
    metrics: Mapping[str, float]
    """The last logged values by TensorBoard tag."""
    evaluation: EvalMetrics | None
    """The last evaluation."""
    counts: Mapping[str, int]


class Trainer:
    """Trains any `TrainerModule`; everything that is not the loop itself is a callback.

    The run ends at whichever of `max_epochs`, `max_steps` and `max_time` comes first; without any it is one epoch.
    `max_time` is seconds, a timedelta, or "DD:HH:MM:SS". One step is one optimizer update over `accumulate`
    micro-batches. `resume` is None, "auto" (the newest good checkpoint, if there is one) or a checkpoint's path.

    For trying things out: `fast_dev_run=n` takes n steps and n validation batches without loggers and checkpoints
    (True is 1), `overfit_batches=n` trains and validates on the first n batches, `limit_validation_batches` takes a
    number of batches or, as a float, a share of them.
    """

    def __init__(
        self,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: float | timedelta | str | None = None,
        accumulate: int = 1,
        callbacks: Iterable[Callback] = (),
        log_every: int = 10,
        seed: int = 42,
        run_dir: str | Path | None = None,
        resume: Literal["auto"] | str | Path | None = None,
        fast_dev_run: bool | int = False,
        overfit_batches: int = 0,
        limit_validation_batches: int | float | None = None,
    ) -> None:
        counts = {"max_epochs": max_epochs, "max_steps": max_steps, "accumulate": accumulate, "log_every": log_every}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        self.limits = Limits.of(max_epochs, min(filter(None, (max_steps, int(fast_dev_run))), default=None), max_time)
        self.accumulate, self.log_every, self.seed = accumulate, 1 if fast_dev_run else log_every, seed
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.resume, self.overfit_batches = resume, overfit_batches
        self.limit_validation_batches = int(fast_dev_run) or limit_validation_batches
        kept = (callback for callback in callbacks if not fast_dev_run or callback.phase == "callback")
        self.events = Events(kept)
        self.validation_metrics: dict[str, Metric] = {}
        """Further metrics by name; a callback may add some before the first evaluation."""
        self.validation_loader: Loader | None = None
        """The held-out batches of this run, if it has any."""
        self._reset()

    def _reset(self) -> None:
        self.state = TrainingState()
        self.stop_reason: str | None = None
        self.total_steps: int | None = None
        self.step_output: StepOutput | None = None
        self.recent_steps: tuple[StepRecord, ...] = ()
        self.metrics: dict[str, float] = {}
        self.evaluation: EvalMetrics | None = None
        self._evaluation_step: EvaluationStep | None = None
        self._evaluation_requested = self._checkpoint_requested = self._log_due = False
        self._saves = Saves(lambda path: self.events.emit("on_checkpoint_saved", self, self.module, path))

    # What callbacks may ask for.

    def request_stop(self, reason: str) -> None:
        """Stop at the end of this step, after its evaluation and checkpoint. The first reason counts."""
        self.stop_reason = self.stop_reason or reason

    def request_evaluation(self) -> None:
        """Evaluate at the end of this step. Raises TrainingError where the run has no validation loader."""
        if self.validation_loader is None:
            raise TrainingError("an evaluation was asked for, but this run has no validation rows")
        self._evaluation_requested = True

    def request_checkpoint(self) -> None:
        """Save at the end of this step, after the evaluation if there is one."""
        self._checkpoint_requested = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not counted as the steps'; waits for the step under way first."""
        if self.step_output is not None:
            mx.eval(self.step_output.total)
        start = time.perf_counter()
        yield
        self._interval.skip_time(time.perf_counter() - start)

    @property
    def compiled_shapes(self) -> int:
        """How many distinct shapes of micro-batches this run has compiled so far."""
        return self._step.compiled_shapes

    def write_checkpoint(self, directory: Path) -> None:
        """Fill an existing directory with all that a resumed run needs."""
        self._snapshot.write(directory)

    def save_in_background(self, save: Callable[[Callable[[Path], None]], Path]) -> None:
        """A thread calls `save(write)`; `write` fills a directory with what `write_checkpoint` would write now."""
        snapshot = self._snapshot.taken(frozen=True)
        self._saves.add(snapshot.arrays, lambda: save(snapshot.write))

    # The three things a trainer does.

    def fit(
        self, module: TrainerModule, data: DataSource | Loader, validation_loader: Loader | None = None
    ) -> TrainingResult:
        """Train `module` on `data`: an object with `train_loader()` and `validation_loader()`, or loaders.

        Whatever is raised on the way is raised here, after `on_exception` and `teardown`. SIGINT and SIGTERM let the
        step under way end, save as at any end, and raise Interrupted, which exits with 130 or 143.
        """
        self._reset()
        with self._stage("fit", module):
            self._take_loaders(data, validation_loader)
            mx.random.seed(self.seed)
            module.setup("fit")
            self._build()
            self.events.emit("on_fit_start", self, module)
            with stopping_on_signals(self.request_stop):
                with self._saves.all_followed():
                    self._run_epochs()
                self.events.emit("on_fit_end", self, module)
        return self._result()

    def validate(self, module: TrainerModule, loader: Loader) -> EvalMetrics:
        """The mean validation loss over `loader`, and what else is measured."""
        with self._stage("validate", module):
            module.setup("validate")
            self.validation_loader = loaders.first_batches(loader, self.limit_validation_batches)
            self._evaluation_step = None
            return self._evaluate()

    def predict(self, module: TrainerModule, loader: Loader) -> list[Any]:
        """`module.predict(batch)` for each batch, computed, the model in eval mode."""
        with self._stage("predict", module):
            module.setup("predict")
            outputs = []
            with evaluating(module.model):
                for batch in loader:
                    outputs.append(module.predict(from_tree(to_tree(batch))))
                    mx.eval(outputs[-1])
            return outputs

    @contextmanager
    def _stage(self, stage: str, module: TrainerModule) -> Iterator[None]:
        self.module = module
        try:
            self.events.emit("setup", self, module, stage)
            yield
        except Interrupted:
            raise  # the run was saved and ended in order
        except BaseException as error:
            self.events.emit_isolated("on_exception", self, module, error)
            raise
        finally:
            self.events.emit_isolated("teardown", self, module, stage)

    # Preparing a fit.

    def _take_loaders(self, data: DataSource | Loader, validation_loader: Loader | None) -> None:
        layout, metrics = self.module.batch_layout, bool(self.validation_metrics)
        train, validation = loaders.resolve(data, validation_loader, layout, metrics=metrics)
        if self.overfit_batches:
            train = validation = loaders.first_batches(train, self.overfit_batches)
        if validation is not None:
            validation = loaders.first_batches(validation, self.limit_validation_batches)
        self._train_loader, self.validation_loader = train, validation
        self.steps_per_epoch = math.ceil(len(train) / self.accumulate)
        self.total_steps = self.limits.total_steps(self.steps_per_epoch)

    def _build(self) -> None:
        """The optimizer, what a checkpoint restores, and only then the compiled step, which captures both."""
        self.optimizer = self.module.configure_optimizer(self.total_steps)
        self.optimizer.init(self.module.model.trainable_parameters())
        self._snapshot = Snapshot(self.module, self.optimizer, self.state, self.events.callbacks, self._train_loader)
        path = self._resume_path()
        if path is not None:
            self._snapshot.read(path)
            logger.info("resumed from %s: step %d, epoch %d", path, self.state.step, self.state.epoch)
        self.module.model.train()
        mx.eval(self.module.model.parameters(), self.optimizer.state)
        self._step = TrainStep(self.module, self.optimizer, self.accumulate, self.events.transforms, self.events.guards)
        self._interval = LogInterval(self.state.counts)
        self._started = time.perf_counter() - self.state.seconds

    def _resume_path(self) -> Path | None:
        if self.resume != "auto":
            return None if self.resume is None else Path(self.resume)
        found = (callback.latest_checkpoint() for callback in self.events.callbacks)
        return next((path for path in found if path is not None), None)

    # The loop.

    def _run_epochs(self) -> None:
        self._pause()  # what was asked for in on_fit_start
        self._stop_at_limits()
        while not self.stop_reason:
            epoch = self.state.epoch
            self.events.emit("on_epoch_start", self, self.module, epoch)
            windows = loaders.windows(self._train_loader, self.accumulate, self.state.position)
            for window in windows:
                self._run_step(window)
                if self.stop_reason:
                    self._log_due = len(self._interval) > 0
                    break
            self._read_log()
            if self._epoch_is_over():
                next(windows, None)  # the loader, too, comes to the end of its epoch
                self.state.next_epoch()
            self.events.emit("on_epoch_end", self, self.module, epoch)
            self._pause()

    def _run_step(self, window: Sequence[Any]) -> None:
        step, ahead = self.state.step + 1, self.step_output
        self.events.emit_step("on_step_start", self, self.module, step)

        # Dispatched, not waited for: the device goes straight from the last step to this one …
        self.step_output = self._step(window)
        self.events.emit_step("on_step_dispatched", self, self.module, step)
        # … while the host reads the last one's numbers, if they are due, and never runs more than one step ahead.
        self._read_log()
        if ahead is not None:
            mx.eval(ahead.total)

        self.state.consume([self.module.count(batch) for batch in window])
        self._interval.add(step, self.step_output, [getattr(batch, "metadata", None) for batch in window])
        self.events.emit_step("on_step_end", self, self.module, step)
        self._stop_at_limits()
        self._log_due = step % self.log_every == 0 or self.stop_reason is not None
        self._saves.follow()  # what the last step left to be saved is there by now
        self._pause()

    def _pause(self) -> None:
        """Evaluate and save, where that was asked for."""
        if self._evaluation_requested or self._checkpoint_requested:
            self._read_log()
        if self._evaluation_requested:
            self._evaluation_requested = False
            with self.paused():
                self._evaluate()
        if self._checkpoint_requested:
            self._checkpoint_requested = False
            self.state.seconds = time.perf_counter() - self._started
            self._saves.begin(lambda: self.events.emit("on_checkpoint", self, self.module, self.state.step))

    def _read_log(self) -> None:
        """The one place where a step's values are read."""
        if not self._log_due:
            return
        self._log_due = False
        metrics, self.recent_steps = self._interval.read(self.state.counts)
        metrics |= self._saves.stall()
        self.events.emit("on_log", self, self.module, self.recent_steps[-1].step, metrics)
        self.metrics = metrics

    def _evaluate(self) -> EvalMetrics:
        self.events.emit("on_evaluation_start", self, self.module, self.state.step)
        self._evaluation_step = self._evaluation_step or EvaluationStep(self.module, self.validation_metrics)
        self.evaluation = self._evaluation_step(self.validation_loader or [])
        self.events.emit("on_evaluation_end", self, self.module, self.state.step, self.evaluation)
        return self.evaluation

    def _stop_at_limits(self) -> None:
        state, seconds = self.state, time.perf_counter() - self._started
        if reason := self.limits.reached(state.step, state.epoch + self._epoch_is_over(), seconds):
            self.request_stop(reason)

    def _epoch_is_over(self) -> bool:
        return self.state.position == len(self._train_loader)

    def _result(self) -> TrainingResult:
        state, seconds = self.state, time.perf_counter() - self._started
        epochs, reason = state.epoch + self._epoch_is_over(), self.stop_reason or ""
        return TrainingResult(state.step, epochs, reason, seconds, self.metrics, self.evaluation, dict(state.counts))
