"""How far the run is, for people."""

import math
import sys
import time
from typing import TYPE_CHECKING

from mlx_trainer import runtime
from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.console import say
from mlx_trainer.callbacks.monitor import improves
from mlx_trainer.callbacks.progress_text import evaluation_line, header_line, last_line, progress_line
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.console import stderr_console, stderr_is_terminal
from mlx_trainer.trainer import Trainer

if TYPE_CHECKING:
    from rich.progress import Progress

REDRAW_S = 0.25


class ProgressBar(Callback):
    """Shows step, elapsed time and time left, loss, learning rate, tokens per second and peak memory on stderr.

    In a terminal it is a bar with its line, without colour where NO_COLOR is set; elsewhere a plain line at each log
    point. Evaluations have a line of their own, the last word of which is "best" where the loss is the lowest so far.

    Costs a clock reading per step, and in a terminal a redraw, about 1 ms, at most four times a second; it never reads
    the device.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Write the header, and draw the bar where there is a terminal."""
        self._started = self._drawn = time.perf_counter()
        self._first_step, self._first_tokens = trainer.state.step, trainer.state.counts.get("tokens", 0)
        self._metrics: dict[str, float] = {}
        self._best_loss: float | None = None
        name, step = type(module).__name__, trainer.state.step
        if trainer.total_steps is None or step < trainer.total_steps:  # else a finished run was resumed
            say(header_line(name, step, trainer.total_steps, trainer.steps_per_epoch, trainer.accumulate))
        if stderr_is_terminal():
            self._bar = terminal_bar(trainer.total_steps)
            self._draw(trainer, step)

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Move the bar, with the newest values that were read for the log."""
        if self._bar is not None and time.perf_counter() - self._drawn > REDRAW_S:
            self._draw(trainer, step)

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Show the new values."""
        self._metrics = {"memory/peak_gb": runtime.memory_bytes().peak / 1e9, **metrics}
        if self._bar is None:
            say(self._line(trainer, step))
        else:
            self._draw(trainer, step)

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Write a line."""
        best = improves(metrics.loss, self._best_loss, "min")
        self._best_loss = metrics.loss if best else self._best_loss
        say(evaluation_line(step, metrics, best))

    def on_fit_end(self, trainer: Trainer, module: TrainerModule) -> None:
        """Write the last line, in place of the bar."""
        self._remove_bar()
        reason = trainer.stop_reason or ""
        seconds, state = time.perf_counter() - self._started, trainer.state
        tokens = state.counts.get("tokens", 0) - self._first_tokens
        say(last_line(state.step - self._first_step, seconds, tokens, reason, trainer.run_dir))

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Give the terminal back."""
        self._remove_bar()

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, trainer: Trainer, step: int) -> None:
        if self._bar is not None:
            self._drawn = time.perf_counter()
            self._bar.update(self._bar.task_ids[0], completed=step, description=self._line(trainer, step))
            self._bar.refresh()

    def _line(self, trainer: Trainer, step: int) -> str:
        elapsed_s = time.perf_counter() - self._started
        done = step - self._first_step
        by_steps = math.inf
        if trainer.total_steps is not None and done:
            by_steps = elapsed_s / done * (trainer.total_steps - step)
        limit = trainer.limits.max_seconds
        by_time = math.inf if limit is None else limit - trainer.state.seconds - elapsed_s
        left_s = min(by_steps, by_time)
        return progress_line(
            step, trainer.total_steps, elapsed_s, left_s if math.isfinite(left_s) else None, self._metrics
        )


def terminal_bar(total_steps: int | None) -> "Progress":
    """Return a bar, drawn, which is redrawn when told to: no thread takes time from the training."""
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(bar_width=20), TextColumn("{task.description}", markup=False)
    bar = Progress(
        *columns,
        console=stderr_console(),
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what goes into a file must stay there
    )
    bar.add_task("", total=total_steps)
    bar.start()
    return bar
