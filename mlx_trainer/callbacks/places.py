"""Where a callback writes: a path that was given, else a place in the run folder; refused early if it cannot."""

import tempfile
from pathlib import Path

from mlx_trainer.monitoring.files import JsonLines, read_json_lines, to_json, write_atomic
from mlx_trainer.trainer import Trainer


def place(given: str | Path | None, trainer: Trainer, name: str, owner: str) -> Path:
    """Return `given`, or `name` in the trainer's run folder. Raises ValueError where there is neither."""
    if given is not None:
        return Path(given)
    if trainer.run_dir is None:
        raise ValueError(f"{owner} does not know where to write: give it a path, or give the Trainer a run_dir")
    return trainer.run_dir / name


def writable_folder(folder: Path) -> Path:
    """Create a folder where needed and write into it once. Raises OSError that names it where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(error.errno, f"cannot write into this folder: {error.strerror}", str(folder)) from error


def lines_up_to(path: Path, step: int) -> tuple[JsonLines, int]:
    """Open a file of records with a `step`, without those that a run beginning at `step` writes again (at 0: all).

    Also returns the step of the last record that stays, 0 where none does.
    """
    records = read_json_lines(path) if path.exists() else []
    kept = [record for record in records if 0 < step >= int(record["step"])]
    if len(kept) < len(records):
        write_atomic(path, "".join(to_json(record) + "\n" for record in kept))
    return JsonLines(path), int(kept[-1]["step"]) if kept else 0
