"""An end where nothing improves any more."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.monitor import check_mode, improves, monitored
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Stops the run when `monitor` did not improve by more than `min_delta` for `patience` readings in a row.

    A metric of the evaluations ("val/loss") is read at each evaluation, any other ("train/loss") at each log point;
    `mode` says whether "min" or "max" is better, and NaN or infinity is no improvement. The state survives a resume.
    Raises TrainingError, naming those that exist, for a metric that was not measured.

    Costs nothing between log points and evaluations, and one comparison at them.
    """

    def __init__(self, monitor: str = "val/loss", patience: int = 3, min_delta: float = 0.0, mode: str = "min") -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience is {patience}; it must be 1 or more readings")
        if min_delta < 0:
            raise ValueError(f"EarlyStopping: min_delta is {min_delta}; it must be 0 or more")
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, min_delta, check_mode(mode)
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.without_improvement = self.readings = 0

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Begin anew; a checkpoint's state comes later."""
        self._reset()
        self._fitting = stage == "fit"

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """A run that was stopped here and is resumed has nothing left to do, unless it is given more patience."""
        if self.without_improvement >= self.patience:
            trainer.request_stop(f"{self.monitor} did not improve for {self.patience} readings")

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Read a metric of the training."""
        if not self.monitor.startswith("val/"):
            self._read(trainer, step, metrics)

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Read a metric of the evaluation."""
        if self._fitting and self.monitor.startswith("val/"):
            self._read(trainer, step, metrics.as_dict())

    def on_fit_end(self, trainer: Trainer, module: TrainerModule) -> None:
        """Say so where it never had anything to read."""
        if self.readings == 0 and trainer.step_output is not None:
            logger.warning("EarlyStopping never read %s: no evaluation was made; add Evaluation()", self.monitor)

    def _read(self, trainer: Trainer, step: int, metrics: Mapping[str, float]) -> None:
        value = monitored(self.monitor, metrics, "EarlyStopping")
        self.readings += 1
        if improves(value, self.best, self.mode, self.min_delta):
            self.best, self.without_improvement = value, 0
            return
        self.without_improvement += 1
        if not math.isfinite(value):
            count = f"{self.without_improvement} of {self.patience} readings without improvement"
            logger.warning("%s is %s at step %d, which counts as no improvement (%s)", self.monitor, value, step, count)
        if self.without_improvement >= self.patience:
            best = "no finite value was seen" if self.best is None else f"the best was {self.best:.6g}"
            trainer.request_stop(
                f"{self.monitor} did not improve for {self.patience} readings (now {value:.6g}, {best})"
            )

    def state_dict(self) -> dict[str, Any]:
        """The best value and the readings since."""
        return {"best": self.best, "without_improvement": self.without_improvement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best, self.without_improvement = state["best"], state["without_improvement"]
