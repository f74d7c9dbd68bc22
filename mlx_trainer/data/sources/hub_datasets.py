"""Splits of Hugging Face datasets: of a `Dataset` or `DatasetDict` at hand, or of one that `hf:owner/name` names.

Loading from the Hub is `datasets.load_dataset`, which the tests replace: they have no network.
"""

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.sources.tables import DatasetSource

HUB = "hf:"
HUB_NAME = re.compile(r"hf:(?P<path>[\w.-]+/[\w.-]+)(?::(?P<config>[^:]+))?", re.ASCII)
HELD_OUT = ("validation", "valid")

logger = logging.getLogger("mlx_trainer.data")


def is_dataset(data: object) -> bool:
    """Whether `data` is a Hugging Face dataset of whatever kind; does not import the package."""
    module = sys.modules.get("datasets")  # or a folder of the user's of that name
    kinds = ("Dataset", "DatasetDict", "IterableDataset", "IterableDatasetDict")
    return any(isinstance(data, getattr(module, kind, ())) for kind in kinds)


def splits_of(data: object, name: str | None = None) -> dict[str, DatasetSource]:
    """The splits of a dataset by name, with `train` for one that has none; `name` is what its rows are called.

    Raises DataError where it is streamed: its rows have no number, and it may have no end.
    """
    module = import_module("datasets")
    if isinstance(data, module.IterableDataset | module.IterableDatasetDict):
        raise DataError("The dataset is streamed, so its rows cannot be split. Load it without `streaming=True`.")
    if isinstance(data, Mapping):
        return {
            str(split): DatasetSource(table, f"{name}/{split}" if name else str(split)) for split, table in data.items()
        }
    table: Any = data
    return {"train": DatasetSource(table, name or str(table.split or "dataset"))}


def load_hub(name: str) -> dict[str, DatasetSource]:
    """The splits of `hf:owner/name` or `hf:owner/name:config`; no code of the dataset is run.

    Raises DataError for another form of name, without the `datasets` package, and where it cannot load that dataset.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise DataError(f"{name!r} names no dataset of the Hub. Give hf:owner/name or hf:owner/name:config.")
    try:
        module = import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{name} takes the datasets package, which is not installed: pip install 'mlx-trainer[datasets]'."
        ) from error
    try:
        data = module.load_dataset(match["path"], match["config"])
    except Exception as error:  # of many kinds: no network, no such name, no such configuration, no right to read it
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DataError(f"{name} cannot be loaded: {reason}. Is the name right, and the Hub within reach?") from error
    return splits_of(data, name.removeprefix(HUB))


def choose_splits(splits: Mapping[str, DatasetSource], *, hold_out: bool) -> tuple[DatasetSource, list[DatasetSource]]:
    """The split to train on and, if wanted and there, the one to hold out; the others are left alone, which is told.

    Raises DataError where there is no train split, with those that are there instead, or two to hold out.
    """
    if "train" not in splits:
        raise DataError(
            f"The dataset has no split named train; it has {', '.join(splits) or 'none'}. "
            "Give the one to train on, such as dataset['train_sft']."
        )
    held_out = held_out_split(splits) if hold_out else []
    for split, source in splits.items():
        if split not in ("train", *held_out):
            logger.info("%s is left alone: no row of it is read", source.location)
    return splits["train"], [splits[split] for split in held_out]


def held_out_split(splits: Iterable[str]) -> list[str]:
    """The name of the split to hold out, or none; raises DataError where there are two."""
    found = [split for split in splits if split in HELD_OUT]
    if len(found) > 1:
        raise DataError(f"The dataset has both {found[0]} and {found[1]}. Give the one to hold out as validation_path.")
    return found


def rows_to_hold_out(splits: Mapping[str, DatasetSource]) -> DatasetSource:
    """The rows of a dataset that is given to be held out: its validation split, or its only one; raises DataError."""
    found = held_out_split(splits) or list(splits)
    if len(found) != 1:
        raise DataError(
            f"The dataset to hold out has no split named validation; it has {', '.join(splits) or 'none'}. "
            "Give the one to hold out, such as dataset['test_sft']."
        )
    return splits[found[0]]
