"""`mlx-trainer replay`: a step of a run again, as it was, and what was in it."""

from mlx_trainer.replaying.replay import replay
from mlx_trainer.replaying.step import ReplayedRow, ReplayedStep
from mlx_trainer.replaying.text import show

__all__ = ["ReplayedRow", "ReplayedStep", "replay", "show"]
