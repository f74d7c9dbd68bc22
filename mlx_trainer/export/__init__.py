"""What leaves a training for other programs, and the proof that they compute the same."""

from mlx_trainer.export.checking import Difference, compare_logits

__all__ = ["Difference", "compare_logits"]
