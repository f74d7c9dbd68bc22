"""Whether a disk has the room that checkpoints need, before the first step."""

import os
import shutil
import tempfile
from pathlib import Path

from mlx_trainer.checkpoint.manifest import CheckpointError


def check_room(folder: Path, checkpoint: int, number: int, result: int) -> None:
    """Raise CheckpointError unless there is room for so many checkpoints of so many bytes and the result, in bytes.

    Quotas, and limits on the size of a file, show only when something is written, so one checkpoint's room is taken for
    a moment, where the system can do that without writing (not on macOS).
    """
    free, needed = shutil.disk_usage(folder).free, number * checkpoint + result
    if free < needed:
        raise CheckpointError(
            f"{folder} has room for {free:,} bytes; this run needs {needed:,} for {number} checkpoints of "
            f"{checkpoint:,} bytes and the result: free some, keep fewer checkpoints (keep_last), "
            "or name a directory on another disk"
        )
    if hasattr(os, "posix_fallocate"):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, checkpoint)
        except OSError as error:
            raise CheckpointError(
                f"{folder} cannot take a checkpoint of {checkpoint:,} bytes: {error.strerror}; raise that limit, or "
                "name a directory on another disk"
            ) from error
