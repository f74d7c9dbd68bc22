"""Folders of train, valid and test files."""

import logging
from pathlib import Path

from mlx_trainer.data.samples.conversation import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

logger = logging.getLogger("mlx_trainer.data")


def folder_parts(folder: Path, *, hold_out: bool) -> tuple[list[Path], list[Path]]:
    """The file of `folder` to train on and, if wanted and there, the one to hold out; `test` is left alone and told.

    Raises DataError where there is no train file, with what is there instead, or two of a kind.
    """
    train = found(folder, "train")
    if not train:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        raise DataError(
            f"{folder} is a directory without train.jsonl; it holds {there}. Give the path of one JSONL file, or a "
            "directory with train.jsonl and, to hold out its rows, valid.jsonl."
        )
    for untouched in found(folder, "test"):
        logger.info("%s is left for tests: no row of it is read", untouched)
    return train, found(folder, "valid", "validation") if hold_out else []


def found(folder: Path, *stems: str) -> list[Path]:
    """The file of `folder` with one of these names, or none; raises DataError where two have."""
    files = [path for stem in stems for suffix in SUFFIXES if (path := folder / (stem + suffix)).is_file()]
    if len(files) > 1:
        raise DataError(f"{folder} has both {files[0].name} and {files[1].name}. Leave one of them there.")
    return files
