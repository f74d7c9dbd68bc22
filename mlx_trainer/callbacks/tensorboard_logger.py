"""Scalars and texts for TensorBoard."""

from pathlib import Path

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.places import place, writable_folder
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.event_file import EventFile, load_tensorboardx
from mlx_trainer.trainer import Trainer


class TensorBoardLogger(Callback):
    """Writes every metric of `on_log` and of evaluations under its own tag, the x axis being the optimizer step.

    The files are in `directory`, else in `tensorboard/` of the run folder. Texts come through `log_text`. A run that
    starts or resumes at step s hides what an earlier run in this folder wrote after s, so that each step is there once,
    also after a kill: what was logged is in the file. Raises OSError at the start for a folder that cannot be written.

    Costs nothing between log points; at one, about 20 µs per scalar, and a write.
    """

    phase = "logger"

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = directory
        self._file: EventFile | None = None

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Refuse a folder that cannot be written, and import tensorboardX, before anything is loaded."""
        if stage == "fit":
            load_tensorboardx()
            writable_folder(self._folder(trainer))

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open a file at the step where the run begins."""
        step = trainer.state.step
        self._file = EventFile(self._folder(trainer), purge_step=step + 1 if step else 0)

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Write the means since the last log."""
        if self._file is not None:
            self._file.add_scalars(step, metrics)

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Write what was measured on held-out rows."""
        if self._file is not None:  # not in trainer.validate, which returns its metrics
            self._file.add_scalars(step, metrics.as_dict())

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, read as Markdown by TensorBoard."""
        if self._file is not None:
            self._file.add_text(step, tag, text)

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _folder(self, trainer: Trainer) -> Path:
        return place(self.directory, trainer, "tensorboard", "TensorBoardLogger")
