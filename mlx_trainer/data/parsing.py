"""Lines to samples: the part of the way from rows to tokens that needs no tokenizer, done while others are encoded."""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, TypeVar

from mlx_trainer.data.conversation import DataError, RowError, Sample, Text
from mlx_trainer.data.files import Progress
from mlx_trainer.data.formats import FORMATS, detect_format
from mlx_trainer.data.jsonl import Line
from mlx_trainer.data.recipe import Recipe
from mlx_trainer.data.sources import Source

ENCODED_TOGETHER = 1024
BYTES_TOGETHER = 2 << 20
"""Rows are encoded in parts of at most so many rows, or about so many bytes as they are on disk."""

Item = TypeVar("Item")


class ParsedRow(NamedTuple):
    """What a line holds, or why it cannot be used; `control` is the control token that a text spells, if it does."""

    line: int
    sample: Sample | RowError
    format: str = ""
    control: str | None = None


def parse_rows(lines: Iterable[Line], recipe: Recipe) -> list[ParsedRow]:
    """The row of each line."""
    return [parse_row(line, recipe) for line in lines]


def parse_row(line: Line, recipe: Recipe) -> ParsedRow:
    """The row of a line."""
    if isinstance(line.value, RowError):
        return ParsedRow(line.number, line.value)
    try:
        row = recipe.mapping.apply(line.value)
        name = detect_format(row)
        sample = FORMATS[name].parse(row)
    except RowError as error:
        return ParsedRow(line.number, error)
    control = recipe.encoder.encoder.spelled_control(sample.text) if isinstance(sample, Text) else None
    return ParsedRow(line.number, sample, name, control)


def parsed_ahead(source: Source, recipe: Recipe, progress: Progress) -> Generator[list[ParsedRow], None, None]:
    """The rows of `source` in parts that are encoded together; raises DataError where it cannot be read."""
    made = (parse_rows(lines, recipe) for lines in parts(read(source, progress)))
    with closing(ahead(made)) as parsed:
        yield from parsed


def read(source: Source, progress: Progress) -> Iterator[Line]:
    """The lines of `source`; raises DataError for an error of the system, which is then none of the cache."""
    try:
        yield from source.lines(progress)
    except OSError as error:
        raise DataError(f"{source.location} cannot be read to its end: {error.strerror or error}.") from error


def parts(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """The lines in parts that are encoded together."""
    part: list[Line] = []
    size = 0
    for line in lines:
        part.append(line)
        size += line.size
        if len(part) == ENCODED_TOGETHER or size > BYTES_TOGETHER:
            yield part
            part, size = [], 0
    if part:
        yield part


def ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The `items`, each of them made in a thread while the one before it is in use.

    Rows are parsed by Python on one core, and encoded outside Python on all of them: so neither waits for the other.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="mlx-trainer-rows") as thread:
        following = thread.submit(next, iterator, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, iterator, None)
            yield item
