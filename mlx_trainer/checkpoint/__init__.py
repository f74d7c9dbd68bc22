"""Checkpoints: directories that are complete or absent, verified before anything in them is read."""

from mlx_trainer.checkpoint.compressed import check_level, load_tensors
from mlx_trainer.checkpoint.directory import write_directory
from mlx_trainer.checkpoint.finite import check_finite, write_finite
from mlx_trainer.checkpoint.manifest import FORMAT_VERSION, MANIFEST, CheckpointError, seal, verify
from mlx_trainer.checkpoint.runs import same_run
from mlx_trainer.checkpoint.saves import Saves
from mlx_trainer.checkpoint.store import OPTIMIZER_FILE, CheckpointStore, step_of

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "OPTIMIZER_FILE",
    "CheckpointError",
    "CheckpointStore",
    "Saves",
    "check_finite",
    "check_level",
    "load_tensors",
    "same_run",
    "seal",
    "step_of",
    "verify",
    "write_directory",
    "write_finite",
]
