"""Steps whose numbers are not finite are not taken."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from mlx_trainer.callback import Callback, Gradients
from mlx_trainer.fusion import all_finite
from mlx_trainer.interval import StepRecord
from mlx_trainer.module import TrainerModule
from mlx_trainer.step import StepContext
from mlx_trainer.trainer import Trainer, TrainingError

logger = logging.getLogger(__name__)


class NaNGuard(Callback):
    """Skips an update whose loss or gradient norm is not finite; `patience` of them in a row end the run.

    Parameters and optimizer state then stay bit for bit as they were. At the next log point a warning names the steps
    and their rows, and `train/skipped_steps` is the total so far. The logged loss is left as it is: NaN shows there.
    Raises TrainingError, at a log point, after `patience` skipped steps in a row; with `rollback` the run goes back to
    the newest checkpoint instead and on with the rows that follow (`Trainer.request_rollback`).

    Costs nothing on the host between log points; on the device, the gradients' norm (which GradientClipping shares)
    and the choice between new and old parameters and optimizer state, which are read once more for it.
    """

    def __init__(self, patience: int = 3, rollback: bool = False) -> None:
        if patience < 1:
            raise ValueError(f"NaNGuard: patience is {patience}; it must be 1 or more steps")
        self.patience, self.rollback = patience, rollback
        self.skipped = self.in_a_row = 0

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Count from zero; a checkpoint's counts come later."""
        self.skipped = self.in_a_row = 0

    def accept_update(self, loss: mx.array, gradients: Gradients, context: StepContext) -> mx.array:
        """Whether loss and gradient norm, before any transform, are finite."""
        return all_finite(loss, context.grad_norm)

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Tell of the steps that were skipped since the last log."""
        skipped = [record for record in trainer.recent_steps if self.name in record.refused_by]
        self.skipped += len(skipped)
        metrics["train/skipped_steps"] = float(self.skipped)
        if skipped:
            logger.warning("loss or gradient was not finite, so no update was made: %s", described(skipped))
        for record in trainer.recent_steps:
            if record.step > trainer.rollbacks.last_step:  # one dispatched before that says nothing of what came back
                self.in_a_row = self.in_a_row + 1 if record in skipped else 0
            if self.in_a_row >= self.patience:
                self._give_up(trainer, record)

    def _give_up(self, trainer: Trainer, record: StepRecord) -> None:
        text = f"{self.in_a_row} steps in a row had a loss or gradient that was not finite, the last of them: "
        text += described([record])
        if not self.rollback:
            raise TrainingError(
                f"{text}. A lower learning rate, or bfloat16 or float32 in place of float16, helps; so does a look at "
                "these rows"
            )
        self.in_a_row = 0
        trainer.request_rollback(text)

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def described(records: Iterable[StepRecord]) -> str:
    """Steps and where their rows came from: `step 7 (chats.jsonl:12, chats.jsonl:31)`."""
    return ", ".join(f"step {record.step}{_rows(record.metadata)}" for record in records)


def _rows(metadata: Sequence[Any]) -> str:
    known = [getattr(each, "rows", (each,)) for each in metadata if each is not None]
    names = ", ".join(str(row) for rows in known for row in rows)
    return f" ({names})" if names else ""
