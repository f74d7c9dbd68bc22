"""Which rows each step was trained on."""

import logging

from mlx_trainer.callbacks.lines import LinesLogger
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)


class Ledger(LinesLogger):
    """Appends a JSON line for each step to `path`, else to `ledger.jsonl` in the run folder: its rows, as proof.

        {"step": 7, "epoch": 0, "rows": ["chats.jsonl:12", "chats.jsonl:31"]}

    Rows are `batch.metadata.rows`, those of all micro-batches in the order of training. A line tells of a step that was
    taken; whether NaNGuard kept its update is in the log. A resumed run first drops the lines after its step, so that
    each step stands there once, whatever happened in between; a new run drops all. All lines up to a checkpoint are on
    the disk before it is complete. Raises ValueError for batches that do not name their rows, OSError at the start for
    a folder that cannot be written.

    Costs per step a line handed to the operating system, about 20 µs for 8 rows; at a checkpoint a wait for the disk, a
    few milliseconds; and on the disk about 20 bytes for each row that is trained.
    """

    file_name = "ledger.jsonl"

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open the file at the step where the run begins; tell where its lines end before that."""
        super().on_fit_start(trainer, module)
        step, last = trainer.state.step, self._last_step
        if last != step:
            logger.warning("%s ends at step %d, but the run goes on after step %d", self._place(trainer), last, step)

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Write the rows."""
        rows = [row for metadata in trainer.step_metadata for row in getattr(metadata, "rows", ())]
        if not rows:
            raise ValueError("Ledger: the batches do not say which rows they hold; give them metadata with rows")
        if self._lines is not None:
            self._lines.write({"step": step, "epoch": trainer.state.epoch, "rows": rows})

    def on_checkpoint(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Have the lines on the disk before the checkpoint that builds on them."""
        if self._lines is not None:
            self._lines.sync()
