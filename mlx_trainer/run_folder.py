"""The folder of a run: its name, and whether it can be used."""

import os
import re
from itertools import count
from pathlib import Path

from mlx_trainer.checkpoint import verify
from mlx_trainer.config import Config, ConfigError


def run_directory(config: Config) -> Path:
    """Return the folder that `config` names; else runs/ and the dataset's name, numbered where runs have it already."""
    if config.run.directory is not None:
        return Path(config.run.directory)
    name = run_name(config.data.train_paths[0])
    numbered = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in count(1))
    taken, free = [], next(numbered)
    while free.exists():
        taken, free = [free], next(numbered)
    return taken[0] if taken and config.run.resume == "auto" else free


def run_name(path: str) -> str:
    """Return the name of a run on the data at `path`: that of the file, folder or dataset, as a folder can have it.

    >>> [run_name(path) for path in ("a/chats.jsonl.gz", "hf:owner/name:config", "logs/*.jsonl", "v1.5/")]
    ['chats', 'name-config', 'logs', 'v1.5']
    """
    for part in reversed(Path(path.removeprefix("hf:")).absolute().parts):
        name = part if Path(path).is_dir() else re.sub(r"(\.jsonl?)?(\.gz|\.zst)?$", "", part)
        if name := re.sub(r"[*?\[\]:/]+", "-", name).strip("-"):
            return name
    return "data"


def check_run_directory(run_dir: Path, resume: str | None) -> None:
    """Raise ConfigError where `run_dir` cannot be made or holds another run, CheckpointError for a bad checkpoint."""
    if resume is not None and resume != "auto":
        verify(Path(resume))
    if resume is None and any(run_dir.glob("checkpoints/step-*")):
        raise ConfigError(f"{run_dir}: holds an earlier run; continue it with --resume auto, or name another --output")
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"{run_dir}: cannot be made, because {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{run_dir}: cannot be made, because {existing} is not yours to write")
