"""Lines to samples: the part of the way from rows to tokens that needs no tokenizer."""

from collections.abc import Iterable
from typing import NamedTuple

from mlx_trainer.data.conversation import RowError, Sample, Text
from mlx_trainer.data.formats import FORMATS, detect_format
from mlx_trainer.data.jsonl import Line
from mlx_trainer.data.recipe import Recipe


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
