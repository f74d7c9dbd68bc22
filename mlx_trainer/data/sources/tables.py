"""Rows of a Hugging Face dataset that is at hand."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from attrs import frozen

from mlx_trainer.data.samples.conversation import DataError, RowError
from mlx_trainer.data.samples.fields import JsonObject
from mlx_trainer.data.sources.jsonl import Line

TOLD_TOGETHER = 1024
"""Rows between two calls of `progress`."""


class Table(Protocol):
    """What is used of a `datasets.Dataset`."""

    _fingerprint: str

    @property
    def split(self) -> object:
        """Name of the split it was loaded as, if any."""

    @property
    def format(self) -> dict[str, Any]:
        """How rows come out: the type of their values, and the columns."""

    def with_format(self, type: str | None, columns: list[str] | None) -> "Table":
        """The same rows with values of another type."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[object]: ...


@frozen(eq=False)
class DatasetSource:
    """A split of a dataset; `name` is how its rows are named (`owner/name/train`)."""

    table: Table
    name: str
    weight: float = 1.0

    @property
    def full_name(self) -> str:
        """The name with the beginning of the dataset's own fingerprint."""
        return f"{self.name}-{self.table._fingerprint[:8]}"

    @property
    def location(self) -> str:
        """What messages call the dataset as a whole."""
        return self.name if self.name.startswith("dataset") else f"dataset {self.name}"

    def lines(self, progress: Callable[[int], None] | None = None) -> Iterator[Line]:
        """All rows from number 1, without columns that are null; `progress` is told the rows that were read.

        Raises DataError where there is no row.
        """
        number = 0
        for number, row in enumerate(plain(self.table), start=1):
            value = row_of(row)
            yield Line(number, value, letters(value))
            if progress is not None and number % TOLD_TOGETHER == 0:
                progress(TOLD_TOGETHER)
        if progress is not None and number % TOLD_TOGETHER:
            progress(number % TOLD_TOGETHER)
        if not number:
            raise DataError(f"{self.location} has no row. Give one with rows of messages, or of prompt and completion.")

    def fingerprint(self, memory: object = None) -> str:
        """A digest of the dataset's own fingerprint, which follows its content and all that was done to it.

        `memory` is there for files and not used.
        """
        kind = type(self.table)
        version = getattr(sys.modules.get("datasets"), "__version__", "")
        parts = (kind.__module__, kind.__qualname__, version, self.table._fingerprint, str(self.table.split))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def size_hint(self) -> int | None:
        """How many rows there are."""
        return len(self.table)


def plain(table: Table) -> Table:
    """`table` with Python's own values, where it was set to give arrays; a transform of the user's is kept."""
    given = table.format
    return table if given["type"] in (None, "custom") else table.with_format(None, given["columns"])


def row_of(row: object) -> JsonObject | RowError:
    """`row` without its nulls, at every level: a table writes them where a row lacks a column."""
    if not isinstance(row, dict):
        return RowError(f"expected an object of columns, got {type(row).__name__}")
    try:
        found: JsonObject = without_nulls(row)
        return found
    except RecursionError:
        return RowError("nested too deeply to be a row")


def without_nulls(value: Any) -> Any:
    """`value` without the keys of its objects that are null; a null inside a list keeps its place."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def letters(value: object) -> int:
    """How many letters the texts in `value` have, which is about what its line would take on disk."""
    if isinstance(value, dict):
        return sum(map(letters, value.values()))
    if isinstance(value, list):
        return sum(map(letters, value))
    return len(value) if isinstance(value, str) else 0
