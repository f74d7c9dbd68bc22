"""Lines to samples: the part of the way from rows to tokens that needs no tokenizer."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mlx_trainer.data.samples.conversation import DataError, RowError, Sample, Text
from mlx_trainer.data.samples.formats import FORMATS, detect_format
from mlx_trainer.data.sources.files import Progress
from mlx_trainer.data.sources.find import Source
from mlx_trainer.data.sources.jsonl import Line
from mlx_trainer.data.store.recipe import Recipe

ENCODED_TOGETHER = 1024
BYTES_TOGETHER = 2 << 20
"""Rows are encoded in parts of at most so many rows, or about so many bytes as they are on disk."""


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


def parsed_parts(source: Source, recipe: Recipe, progress: Progress) -> Iterator[list[ParsedRow]]:
    """The rows of `source` in parts that are encoded together; raises DataError where it cannot be read."""
    return (parse_rows(lines, recipe) for lines in parts(read(source, progress)))


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
