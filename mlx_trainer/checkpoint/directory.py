"""A directory, complete or absent: written beside its final name, synced, then renamed.

Rename without sync is not enough: after a power cut a complete-looking directory can hold empty files.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mlx_trainer.checkpoint.manifest import CheckpointError
from mlx_trainer.folders import discard, sync

_TEMPORARY, _REPLACED, _REMOVED = ".writing-", ".replaced-", ".removed-"


def write_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory which then stands at `final`, complete, in place of what was there before.

    Raises CheckpointError where the disk does not take it; whatever fails, what was there before stays.
    """
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    try:
        _put_back(final)
        discard(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        _replace(temporary, final)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # MLX has the latter for files that it cannot write
        raise CheckpointError(f"could not write {final}: {error}{_room(temporary)}") from error
    finally:
        discard(temporary)


def _replace(temporary: Path, final: Path) -> None:
    """Rename, and sync the parent, so that the new name survives a power cut."""
    if os.path.lexists(final):  # the same step again, after a resume
        final.rename(final.with_name(f"{_REPLACED}{final.name}"))
    temporary.rename(final)
    sync(final.parent)
    discard(final.with_name(f"{_REPLACED}{final.name}"))


def _put_back(final: Path) -> None:
    """Where a save was killed between the two renames, what it was about to replace stands at `final` again."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if os.path.lexists(final):
        discard(replaced)
    elif os.path.lexists(replaced):
        replaced.rename(final)


def _room(temporary: Path) -> str:
    """How much was written, and how much still fits."""
    try:
        written = sum(path.lstat().st_size for path in temporary.rglob("*"))
        return f" ({written:,} bytes of it were written, {shutil.disk_usage(temporary).free:,} are free there)"
    except OSError:
        return ""


def remove(path: Path) -> None:
    """Remove a directory, under another name first: half of it must not look like a whole one. Raises OSError."""
    doomed = path.with_name(f"{_REMOVED}{path.name}")
    discard(doomed)
    path.rename(doomed)
    discard(doomed)


def put_in_order(folder: Path) -> None:
    """Remove what killed saves left in `folder`; what one was about to replace stands there again."""
    for prefix in (_REPLACED, _TEMPORARY, _REMOVED):
        for path in folder.glob(f"{prefix}*"):
            _put_back(folder / path.name.removeprefix(prefix))
            discard(path)
