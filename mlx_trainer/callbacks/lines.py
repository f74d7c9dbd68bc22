"""What callbacks that write JSON lines have in common."""

from pathlib import Path

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.places import lines_up_to, place, writable_folder
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.files import JsonLines
from mlx_trainer.trainer import Trainer


class LinesLogger(Callback):
    """Has a file of records with a `step`: `path`, else `file_name` in the run folder.

    A resumed run first drops the lines after its step, a new one all lines. Raises OSError at the start for a folder
    that cannot be written.
    """

    phase = "logger"
    file_name: str

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path
        self._lines: JsonLines | None = None

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Refuse a folder that cannot be written before anything is loaded."""
        if stage == "fit":
            writable_folder(self._place(trainer).parent)

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open the file at the step where the run begins."""
        self._lines, self._last_step = lines_up_to(self._place(trainer), trainer.state.step)

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _place(self, trainer: Trainer) -> Path:
        return place(self.path, trainer, self.file_name, type(self).__name__)
