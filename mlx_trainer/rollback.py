"""Back to the newest good checkpoint, in the middle of a run."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_trainer.failure import TrainingError
from mlx_trainer.interval import StepRecord

logger = logging.getLogger(__name__)


class Rollbacks:
    """What callbacks asked to be undone, and how often in a row; a log without a refused step ends the row."""

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ValueError(f"max_rollbacks is {most}; it must be 1 or more")
        self.most = most
        self.reason: str | None = None
        self.in_a_row = 0
        self.last_step = 0
        """The step after which parameters last went back; 0: never."""

    def request(self, reason: str) -> None:
        """Go back at the end of the step; the first reason counts."""
        self.reason = self.reason or reason

    def judge(self, records: Sequence[StepRecord]) -> None:
        """Count anew after a log of steps that were all taken."""
        if self.reason is None and all(record.accepted for record in records):
            self.in_a_row = 0

    def make(self, step: int, newest: Path | None, rewind: Callable[[Path], int]) -> None:
        """Let `rewind`, which returns the step of a checkpoint, go back to `newest`.

        Raises TrainingError without a checkpoint, and after `most` in a row.
        """
        reason, self.reason = self.reason, None
        if newest is None:
            raise TrainingError(f"{reason}, and there is no checkpoint to go back to; save more often, or skip instead")
        if self.in_a_row == self.most:
            raise TrainingError(f"{reason}, again after going back {self.most} times without a good log in between")
        self.in_a_row, self.last_step = self.in_a_row + 1, step
        logger.warning(
            "%s: parameters, optimizer and randomness go back from step %d to step %d (%s), training goes on after "
            "these rows",
            reason,
            step,
            rewind(newest),
            newest,
        )
