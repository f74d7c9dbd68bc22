"""Scalars and texts for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.places import place, writable_folder
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class TensorBoardLogger(Callback):
    """Writes every metric of `on_log` and of evaluations under its own tag, the x axis being the optimizer step.

    The files are in `directory`, else in `tensorboard/` of the run folder. Texts come through `log_text`. A run that
    starts or resumes at step s hides what an earlier run in this folder wrote after s. Raises OSError at the start for
    a folder that cannot be written.

    Costs nothing between log points; at one, about 20 µs per scalar: a thread of tensorboardX writes the file.
    """

    phase = "logger"

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = directory
        self._writer: SummaryWriter | None = None

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Refuse a folder that cannot be written, and import tensorboardX, before anything is loaded."""
        if stage == "fit":
            import tensorboardX  # noqa: F401

            writable_folder(self._folder(trainer))

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open a file at the step where the run begins."""
        from tensorboardX import SummaryWriter

        step = trainer.state.step
        self._writer = SummaryWriter(
            str(self._folder(trainer)),
            purge_step=step + 1 if step else 0,
            max_queue=1000,  # so long that the training never waits for the disk
            flush_secs=10,
            filename_suffix=f".{step:08d}",  # without it, a run resumed within a second would overwrite the file
        )

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Write the means since the last log."""
        self._write(step, metrics)

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Write what was measured on held-out rows."""
        self._write(step, metrics.as_dict())

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, read as Markdown by TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Write the rest and close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _folder(self, trainer: Trainer) -> Path:
        return place(self.directory, trainer, "tensorboard", "TensorBoardLogger")

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:  # not in trainer.validate, which returns its metrics
            for tag, value in metrics.items():
                self._writer.add_scalar(tag, value, step)
