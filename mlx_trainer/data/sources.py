"""Where rows come from: a file, several files, or a folder of train, valid and test files, compressed or not."""

import gzip
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from attrs import frozen

from mlx_trainer.data.conversation import DataError
from mlx_trainer.data.zstd import zstd_lines

Paths = str | Path | Sequence[str | Path]

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")

logger = logging.getLogger("mlx_trainer.data")


@frozen
class Source:
    """A file of rows, and how its rows name it: `chats.jsonl`, or the path where another file has that name too."""

    path: Path
    name: str


@frozen
class Sources:
    """The files to train on, and those to hold out; where the latter are none, the former are split."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...]


def find_sources(path: Paths, validation_path: Paths | None = None) -> Sources:
    """The files at `path`: one, several, or a folder's train and valid; `validation_path` stands in for the latter.

    Raises DataError for an empty list and for a folder without a train file, or with two of a kind.
    """
    train, validation = listed(path), listed(validation_path)
    if not train:
        raise DataError("The list of data files is empty. Give one JSONL file or more.")
    if len(train) == 1 and train[0].is_dir():
        folder = train[0]
        train = [train_file(folder)]
        validation = validation or found(folder, "valid", "validation")
        for untouched in found(folder, "test"):
            logger.info("%s is left for tests: no row of it is read", untouched)
    named = name_all([*train, *validation])
    return Sources(named[: len(train)], named[len(train) :])


def listed(path: Paths | None) -> list[Path]:
    """One path or several as a list."""
    if path is None:
        return []
    return [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]


def train_file(folder: Path) -> Path:
    """The file of `folder` to train on; raises DataError with what is there instead."""
    files = found(folder, "train")
    if not files:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        raise DataError(
            f"{folder} is a directory without train.jsonl; it holds {there}. Give the path of one JSONL file, or a "
            "directory with train.jsonl and, to hold out its rows, valid.jsonl."
        )
    return files[0]


def found(folder: Path, *stems: str) -> list[Path]:
    """The file of `folder` with one of these names, or none; raises DataError where two have."""
    files = [path for stem in stems for suffix in SUFFIXES if (path := folder / (stem + suffix)).is_file()]
    if len(files) > 1:
        raise DataError(f"{folder} has both {files[0].name} and {files[1].name}. Leave one of them there.")
    return files


def name_all(paths: Sequence[Path]) -> tuple[Source, ...]:
    """`paths` with the names that tell them apart."""
    names = Counter(path.name for path in paths)
    return tuple(Source(path, path.name if names[path.name] == 1 else str(path)) for path in paths)


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file that is plain, `.gz` or `.zst`; raises DataError where its compression is damaged."""
    try:
        yield from open_lines(path)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no valid gzip file: {error}. Compress it anew with `gzip`.") from error
    except EOFError as error:
        raise DataError(f"{path} ends in the middle of its compressed data. Copy or compress it anew.") from error


def open_lines(path: Path) -> Iterable[bytes]:
    """The lines of `path` by its suffix."""
    if path.suffix == ".zst":
        yield from zstd_lines(path)
    else:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
