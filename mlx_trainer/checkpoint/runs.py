"""Whose a checkpoint is: a folder may hold those of several runs, where it was used again.

Each says in its manifest which run it is of, and the folder says, in `.run`, which run is to be gone on with.
"""

import logging
import os
import re
import uuid
from itertools import count
from pathlib import Path

from mlx_trainer.checkpoint.manifest import CheckpointError, run_of
from mlx_trainer.folders import open_plain, write_synced

logger = logging.getLogger(__name__)

_RUN = ".run"
UNKNOWN = "unknown"
"""The owner of a checkpoint that does not say."""


def new_run() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex


def owner(path: Path) -> str | None:
    """The id of the run that wrote a checkpoint, None where it has none, UNKNOWN where its manifest is damaged."""
    try:
        return run_of(path)
    except CheckpointError:
        return UNKNOWN


def same_run(path: Path | None, other: Path | None) -> bool:
    """Whether both are checkpoints, of one run."""
    return path is not None and other is not None and owner(path) == owner(other)


def recorded_run(folder: Path) -> str | None:
    """The run that `folder` says is to be gone on with; None where it does not say. Raises CheckpointError."""
    path = folder / _RUN
    try:
        with open_plain(path) as file:
            run = file.read(100).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not re.fullmatch(r"[0-9a-f]{32}\n", run):
        raise CheckpointError(
            f"{path}, which says whose checkpoints are to be gone on with, is damaged; remove it, and the newest "
            "of any run are"
        )
    return run.strip()


def record_run(folder: Path, run: str) -> None:
    """Have `folder` say so."""
    path, text = folder / _RUN, f"{run}\n"
    if not (path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode()):
        write_synced(path, text)


def make_way(final: Path, run: str) -> None:
    """Give another run's checkpoint at `final` another name."""
    if final.is_dir() and owner(final) not in (run, UNKNOWN):
        names = (final.with_name(f"other-{final.name}" + f"-{n}" * (n > 1)) for n in count(1))
        other = next(path for path in names if not os.path.lexists(path))
        final.rename(other)
        logger.warning("%s is another run's; it is %s now", final, other.name)
