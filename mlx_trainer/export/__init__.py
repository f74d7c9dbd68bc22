"""What leaves a training for other programs, and the proof that they compute the same."""

from mlx_trainer.export.checking import Difference
from mlx_trainer.export.merging.adapter import read_adapter
from mlx_trainer.export.merging.combine import Combined, combine
from mlx_trainer.export.merging.merge import Merged, base_directory, merge
from mlx_trainer.export.merging.unmerge import Unmerged, check_unmerge

__all__ = [
    "Combined",
    "Difference",
    "Merged",
    "Unmerged",
    "base_directory",
    "check_unmerge",
    "combine",
    "merge",
    "read_adapter",
]
