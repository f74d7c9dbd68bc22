"""The Trainer: one fixed loop, the same for every model. The timeline it follows is in `callback.py`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_trainer import loaders
from mlx_trainer.callback import Callback, Events
from mlx_trainer.checkpoint import Saves
from mlx_trainer.evaluation import EvalMetrics, EvaluationStep, Metric, predictions
from mlx_trainer.failure import TrainingError as TrainingError
from mlx_trainer.failure import forget_earlier_runs, memory_explained
from mlx_trainer.interruption import Interrupted, closed_output_ignored, stopping_on_signals
from mlx_trainer.interval import LogInterval, StepRecord
from mlx_trainer.limits import Limits, at_least_one
from mlx_trainer.loaders import DataSource, Loader
from mlx_trainer.module import TrainerModule
from mlx_trainer.result import TrainingResult as TrainingResult
from mlx_trainer.rollback import Rollbacks
from mlx_trainer.snapshot import Snapshot
from mlx_trainer.state import TrainingState
from mlx_trainer.step import StepOutput, TrainStep
from mlx_trainer.traced import nonfinite


class Trainer:
    """Trains any `TrainerModule`; everything that is not the loop itself is a callback.

    The run ends at whichever of `max_epochs`, `max_steps` and `max_time` comes first; without any it is one epoch.
    `max_time` is seconds, a timedelta, or "DD:HH:MM:SS". One step is one optimizer update over `accumulate`
    micro-batches. `resume` is None, "auto" (the newest good checkpoint, if there is one) or a checkpoint's path. Raises
    CheckpointError where what decides on the numbers has changed since, unless `allow_changes` names it (or "all").
    `config` is kept in checkpoints as it is, to say what a run was made from. `max_rollbacks` is how often parameters
    may go back without a good log in between (see `request_rollback`).

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
        allow_changes: Iterable[str] = (),
        config: Mapping[str, Any] | None = None,
        fast_dev_run: bool | int = False,
        overfit_batches: int = 0,
        limit_validation_batches: int | float | None = None,
        max_rollbacks: int = 3,
    ) -> None:
        at_least_one(max_epochs=max_epochs, max_steps=max_steps, accumulate=accumulate, log_every=log_every)
        self.limits = Limits.of(max_epochs, min(filter(None, (max_steps, int(fast_dev_run))), default=None), max_time)
        self.accumulate, self.log_every, self.seed = accumulate, 1 if fast_dev_run else log_every, seed
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.resume, self.allow_changes, self.config = resume, tuple(allow_changes), config
        self.overfit_batches, self.max_rollbacks = overfit_batches, max_rollbacks
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
        self.step_metadata: Sequence[Any] = ()
        self.recent_steps: tuple[StepRecord, ...] = ()
        self._evaluation_step: EvaluationStep | None = None
        self._evaluation_requested = self._checkpoint_requested = self._log_due = False
        self.rollbacks = Rollbacks(self.max_rollbacks)
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

    def request_rollback(self, reason: str) -> None:
        """At the end of this step, go back to the newest good checkpoint: parameters, optimizer and random state.

        Step count and position go on, so training continues after the rows that did the harm; a schedule goes back,
        too. Raises TrainingError there without a checkpoint, or after `max_rollbacks` without a good log in between.
        """
        self.rollbacks.request(reason)

    def is_sound(self) -> bool:
        """Whether parameters and optimizer state are a finished step's, and finite. Reads the device."""
        return self._step.sound and not nonfinite([self.module.model.trainable_parameters(), self.optimizer.state])

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
        self.state.seconds = self._seconds
        self._snapshot.write(directory)

    def save_in_background(self, save: Callable[[Callable[[Path], None]], Path]) -> None:
        """A thread calls `save(write)`; `write` fills a directory with what `write_checkpoint` would write now."""
        self.state.seconds = self._seconds
        snapshot = self._snapshot.taken(frozen=True)
        self._saves.add(snapshot.arrays, lambda: save(snapshot.write))

    # The three things a trainer does.

    def fit(
        self, module: TrainerModule, data: DataSource | Loader, validation_loader: Loader | None = None
    ) -> TrainingResult:
        """Train `module` on `data`: an object with `train_loader()` and `validation_loader()`, or loaders.

        Whatever is raised on the way is raised here, after `on_exception` and `teardown`. SIGINT, SIGTERM and SIGHUP
        let the step under way end, save as at any end, and raise Interrupted, which exits with 130, 143 or 129.
        """
        self._reset()
        forget_earlier_runs()
        with closed_output_ignored(), self._stage("fit", module):
            self._take_loaders(data, validation_loader)
            mx.random.seed(self.seed)
            module.setup("fit")
            self._build()
            self.events.emit("on_fit_start", self, module)
            with stopping_on_signals(self.request_stop), closing(self._step):
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
            return predictions(module, loader)

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
        both = loaders.resolve(data, validation_loader, layout, metrics=metrics)
        both = loaders.limited(*both, self.overfit_batches, self.limit_validation_batches)
        self.train_loader, self.validation_loader = both
        self.steps_per_epoch = math.ceil(len(self.train_loader) / self.accumulate)
        self.total_steps = self.limits.total_steps(self.steps_per_epoch)

    def _build(self) -> None:
        """The optimizer, what a checkpoint restores, and only then the compiled step, which captures both."""
        self.optimizer = self.module.configure_optimizer(self.total_steps)
        self.optimizer.init(self.module.model.trainable_parameters())
        events, module = self.events, self.module
        self._snapshot = Snapshot.of(self, self.train_loader)
        path = events.latest_checkpoint() if self.resume == "auto" else self.resume
        if path is not None:
            self._snapshot.read(Path(path))
        module.model.train()
        mx.eval(module.model.parameters(), self.optimizer.state)
        if bad := nonfinite(module.model.parameters()):
            raise TrainingError(f"{path or 'the model'} holds NaN or infinity in {bad[0]}; training cannot begin there")
        traced = events.transforms, events.guards, events.updates, self._snapshot.arrays
        self._step = TrainStep(module, self.optimizer, self.accumulate, *traced)
        self._interval = LogInterval(self.state.counts)
        self._started = time.perf_counter() - self.state.seconds

    # The loop.

    def _run_epochs(self) -> None:
        self._pause()  # what was asked for in on_fit_start
        self._stop_at_limits()
        while not self.stop_reason:
            epoch = self.state.epoch
            self.events.emit("on_epoch_start", self, self.module, epoch)
            windows = loaders.windows(self.train_loader, self.accumulate, self.state.position)
            for window in windows:
                self._run_step(window)
                if self.stop_reason:
                    self._log_due = len(self._interval) > 0
                    break
            self._read_log()
            if self._epoch_is_over():
                next(windows, None)  # the loader, too, comes to the end of its epoch
                self.state.next_epoch(loaders.place(self.train_loader))
            self.events.emit("on_epoch_end", self, self.module, epoch)
            self._pause()

    def _run_step(self, window: Sequence[Any]) -> None:
        step, ahead = self.state.step + 1, self.step_output
        self.events.emit_step("on_step_start", self, self.module, step)
        sizes, place = [self.module.count(batch) for batch in window], loaders.place(self.train_loader)

        with memory_explained(step):
            # Dispatched, not waited for: the device goes straight from the last step to this one …
            self.step_output = self._step(window)
            try:
                self.events.emit_step("on_step_dispatched", self, self.module, step)
                # … while the host reads the last one's numbers, if due, and never runs more than one step ahead.
                self._read_log()
                if ahead is not None:
                    mx.eval(ahead.total)
            finally:  # whatever fails meanwhile, the position stays that of the parameters
                self.state.consume(sizes, place)

        self.step_metadata = [getattr(batch, "metadata", None) for batch in window]
        self._interval.add(step, self.step_output, self.step_metadata)
        self.events.emit_step("on_step_end", self, self.module, step)
        self._stop_at_limits()
        self._log_due = step % self.log_every == 0 or self.stop_reason is not None
        self._saves.follow()  # what the last step left to be saved is there by now
        self._pause()

    def _pause(self) -> None:
        """Go back, evaluate and save, where that was asked for."""
        if self._evaluation_requested or self._checkpoint_requested:
            self._log_due |= self._checkpoint_requested and len(self._interval) > 0  # or it would be lost with the run
            self._read_log()
        if self.rollbacks.reason:
            self._saves.follow(wait=True)
            self.rollbacks.make(self.state.step, self.events.latest_checkpoint(), self._snapshot.rewind)
        if self._evaluation_requested:
            self._evaluation_requested = False
            with self.paused():
                self._evaluate()
        if self._checkpoint_requested:
            self._checkpoint_requested = False
            self._saves.begin(lambda: self.events.emit("on_checkpoint", self, self.module, self.state.step))

    def _read_log(self) -> None:
        """The one place where a step's values are read."""
        if not self._log_due:
            return
        self._log_due = False
        metrics, self.recent_steps = self._interval.read(self.state.counts)
        metrics |= self._saves.stall()
        self.events.emit("on_log", self, self.module, self.recent_steps[-1].step, metrics)
        self.rollbacks.judge(self.recent_steps)
        self.state.metrics = metrics

    def _evaluate(self) -> EvalMetrics:
        self.events.emit("on_evaluation_start", self, self.module, self.state.step)
        self._evaluation_step = self._evaluation_step or EvaluationStep(self.module, self.validation_metrics)
        metrics = self.state.evaluation = self._evaluation_step(self.validation_loader or [])
        self.events.emit("on_evaluation_end", self, self.module, self.state.step, metrics)
        return metrics

    def _stop_at_limits(self) -> None:
        state = self.state
        if reason := self.limits.reached(state.step, state.epoch + self._epoch_is_over(), self._seconds):
            self.request_stop(reason)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def _epoch_is_over(self) -> bool:
        return self.state.position == len(self.train_loader)

    def _result(self) -> TrainingResult:
        state, reason = self.state, self.stop_reason or ""
        epochs, counts = state.epoch + self._epoch_is_over(), dict(state.counts)
        return TrainingResult(state.step, epochs, reason, self._seconds, state.metrics, state.evaluation, counts)
