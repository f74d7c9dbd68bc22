"""Metrics as JSON lines."""

import time
from collections.abc import Mapping
from pathlib import Path

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.places import lines_up_to, place, writable_folder
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.files import JsonLines
from mlx_trainer.trainer import Trainer


class MetricsLogger(Callback):
    """Appends one JSON object per log and per evaluation to `path`, else to `metrics.jsonl` in the run folder.

    A line has `step`, `epoch` (as a fraction: 1.5 is the middle of the second), `time` (seconds in `fit`, over all
    resumed parts) and the metrics by TensorBoard tag. Numbers that are not finite are the strings "NaN", "Infinity" and
    "-Infinity", which `monitoring.MetricsTracker.read` takes back. A resumed run first drops the lines after its step,
    a new one all lines. Raises OSError at the start for a folder that cannot be written.

    Costs nothing between log points; at one, a line handed to the operating system, about 60 µs.
    """

    phase = "logger"

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path
        self._lines: JsonLines | None = None

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Refuse a folder that cannot be written before anything is loaded."""
        if stage == "fit":
            writable_folder(self._path(trainer).parent)

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open the file at the step where the run begins."""
        self._lines, _ = lines_up_to(self._path(trainer), trainer.state.step)
        self._started = time.perf_counter() - trainer.state.seconds

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Write the means since the last log."""
        self._write(trainer, step, metrics)

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Write what was measured on held-out rows."""
        self._write(trainer, step, metrics.as_dict())

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _path(self, trainer: Trainer) -> Path:
        return place(self.path, trainer, "metrics.jsonl", "MetricsLogger")

    def _write(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        if self._lines is not None:  # not in trainer.validate, which returns its metrics
            epoch, seconds = step / trainer.steps_per_epoch, time.perf_counter() - self._started
            self._lines.write({"step": step, "epoch": round(epoch, 4), "time": round(seconds, 3), **metrics})
