"""Where rows come from: files, alone, several or in a folder, and Hugging Face datasets, each with its weight."""

import glob
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.sources.files import FileSource
from mlx_trainer.data.sources.folders import folder_parts
from mlx_trainer.data.sources.hub_datasets import HUB, choose_splits, is_dataset, load_hub, rows_to_hold_out, splits_of
from mlx_trainer.data.sources.tables import DatasetSource, Table

Paths = str | Path | Sequence[str | Path] | Mapping[str, float] | Mapping[Path, float] | Table
"""A file, folder, glob or `hf:` name, several of these, these with weights, or a Hugging Face dataset."""

logger = logging.getLogger("mlx_trainer.data")


Source = FileSource | DatasetSource
"""Where rows come from, a file or a split of a dataset alike.

`lines(progress)` gives the rows with their numbers, `name` and `weight` say how they are named and how many times each
is used in an epoch, `location` is for messages, `fingerprint(memory)` a digest of the content alone, and
`size_hint()` how much there is to read, in the units that `progress` is told: bytes on disk, or rows.
"""


@frozen
class Sources:
    """What to train on, and what to hold out; where the latter is none, the former is split."""

    train: tuple[Source, ...]
    validation: tuple[Source, ...]


def find_sources(path: Paths, validation_path: Paths | None = None) -> Sources:
    """The rows to train on and to hold out.

    `path` is a file, a glob, `hf:owner/name`, a list of these, a mapping of these to weights, a Hugging Face dataset,
    or a folder. Of a folder or a dataset that stands alone, the valid or validation part is held out, unless
    `validation_path` stands in for it; the test part is left alone.

    Raises DataError for an empty list, a pattern that nothing matches, the same rows given twice, a weight that is
    none, and for a folder or dataset without a train part, or with two of a kind.
    """
    entries = weighted(path)
    held_out = open_held_out(validation_path)
    alone = len(entries) == 1
    train: list[Source] = []
    for entry, weight in entries:
        parts, own = open_train(entry, folder=alone, hold_out=alone and not held_out)
        train += [evolve(part, weight=weight) for part in parts]
        held_out += own
    refuse_repeated(train)
    named = tell_apart([*train, *held_out])
    return Sources(named[: len(train)], named[len(train) :])


def weighted(path: Paths) -> list[tuple[Any, float]]:
    """Each entry of `path` with its weight; raises DataError."""
    if isinstance(path, str | Path) or is_dataset(path):
        return [(path, 1.0)]
    entries: list[tuple[Any, float]]
    if isinstance(path, Mapping):
        for entry, weight in path.items():
            check_weight(entry, weight)
        entries = [(entry, float(weight)) for entry, weight in path.items()]
    else:
        entries = [(entry, 1.0) for entry in path] if isinstance(path, Iterable) else [(path, 1.0)]
    if not entries:
        raise DataError("The list of data files is empty. Give one JSONL file or more.")
    for entry, _ in entries:
        if not (isinstance(entry, str | Path) or is_dataset(entry)):
            raise DataError(f"The data is {entry!r:.60}. Give the path of a JSONL file, or a Hugging Face dataset.")
    return entries


def check_weight(entry: object, weight: Any) -> None:
    """Raise DataError where `weight` is no number above 0."""
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (number and 0 < weight <= sys.float_info.max):
        raise DataError(
            f"The weight of {str(entry)!r} is {weight!r:.60}. It says how many times each row is used in an epoch: "
            "a number above 0, such as 0.5 or 2."
        )


def open_train(entry: Any, *, folder: bool, hold_out: bool) -> tuple[list[Source], list[Source]]:
    """What to train on of an entry, which may be a `folder`, and what to hold out of it."""
    if (splits := splits_at(entry)) is not None:
        train, held_out = choose_splits(splits, hold_out=hold_out)
        return [train], [*held_out]
    paths = expand(entry)
    own: list[Path] = []
    if folder and len(paths) == 1 and paths[0].is_dir():
        paths, own = folder_parts(paths[0], hold_out=hold_out)
    return [*map(FileSource.of, paths)], [*map(FileSource.of, own)]


def open_held_out(path: Paths | None) -> list[Source]:
    """All rows at `path`, and of a dataset those it holds out itself."""
    if path is None:
        return []
    if isinstance(path, Mapping) and not is_dataset(path):
        raise DataError("validation_path has weights, but each held-out row is read once. Give a list of its files.")
    sources: list[Source] = []
    for entry, _ in weighted(path):
        if (splits := splits_at(entry)) is not None:
            sources.append(rows_to_hold_out(splits))
        else:
            sources += map(FileSource.of, expand(entry))
    return sources


def splits_at(entry: Any) -> dict[str, DatasetSource] | None:
    """The splits of a dataset, or of one that is named `hf:…`; None for a path."""
    if isinstance(entry, str) and entry.startswith(HUB):
        return load_hub(entry)
    return splits_of(entry) if is_dataset(entry) else None


def expand(entry: str | Path) -> list[Path]:
    """The path itself, or the files that it is a pattern of, sorted; raises DataError where there are none."""
    pattern = str(entry)
    if os.path.lexists(pattern) or not glob.has_magic(pattern):
        return [Path(entry)]
    paths = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if not path.is_dir())
    if not paths:
        raise DataError(f"No file matches {pattern!r}. Give a pattern such as 'data/*.jsonl', or the path of a file.")
    return paths


def refuse_repeated(sources: Sequence[Source]) -> None:
    """Raise DataError where two sources are the same one."""
    name, count = Counter(source.full_name for source in sources).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{name} is given {count} times. Give it once; to use its rows more often give it a weight, "
            f"{{{name!r}: {count}}}."
        )


def tell_apart(sources: Sequence[Source]) -> tuple[Source, ...]:
    """`sources`, those that share a name with their full one."""
    names = Counter(source.name for source in sources)
    return tuple(source if names[source.name] == 1 else evolve(source, name=source.full_name) for source in sources)
