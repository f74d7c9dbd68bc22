"""Metrics as JSON lines."""

import time
from collections.abc import Mapping

from mlx_trainer.callbacks.lines import LinesLogger
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer


class MetricsLogger(LinesLogger):
    """Appends one JSON object per log and per evaluation to `path`, else to `metrics.jsonl` in the run folder.

    A line has `step`, `epoch` (as a fraction: 1.5 is the middle of the second), `time` (seconds in `fit`, over all
    resumed parts) and the metrics by TensorBoard tag. Numbers that are not finite are the strings "NaN", "Infinity" and
    "-Infinity", which `monitoring.MetricsTracker.read` takes back. A resumed run first drops the lines after its step,
    a new one all lines. Raises OSError at the start for a folder that cannot be written.

    Costs nothing between log points; at one, a line handed to the operating system, about 60 µs.
    """

    file_name = "metrics.jsonl"

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open the file at the step where the run begins."""
        super().on_fit_start(trainer, module)
        self._started = time.perf_counter() - trainer.state.seconds

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Write the means since the last log."""
        self._write(trainer, step, metrics)

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Write what was measured on held-out rows."""
        self._write(trainer, step, metrics.as_dict())

    def _write(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        if self._lines is not None:  # not in trainer.validate, which returns its metrics
            epoch, seconds = step / trainer.steps_per_epoch, time.perf_counter() - self._started
            self._lines.write({"step": step, "epoch": round(epoch, 4), "time": round(seconds, 3), **metrics})
