"""A file to rows of tokens, with an account of every row that is cut, dropped or cannot be used."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Self

import numpy as np
from attrs import evolve, frozen

from mlx_trainer.data.conversation import DataError, RowError, Sample, Text
from mlx_trainer.data.encoding import SampleEncoder
from mlx_trainer.data.formats import FORMATS, detect_format
from mlx_trainer.data.sources import Source
from mlx_trainer.data.tokenizer import BoolArray, IntArray, Tokens

MAX_BAD_SHARE = 0.05
TOLD = 10
"""So many rows are told one by one, the others as a count."""
ENCODED_TOGETHER = 1024

logger = logging.getLogger("mlx_trainer.data")


@frozen(eq=False)
class TokenRow:
    """One row: `source` as in `chats.jsonl:12`, its `number` in the data from 0, ids and trained mask (length,)."""

    source: str
    number: int
    ids: IntArray
    trained: BoolArray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """How many of the row's labels count."""
        return int(np.count_nonzero(self.trained))

    def cut(self, length: int) -> Self:
        """The row's first `length` tokens."""
        return self if len(self) <= length else evolve(self, ids=self.ids[:length], trained=self.trained[:length])


@frozen(eq=False)
class LoadedFile:
    """The usable rows of a file or of several, cut to the maximum length, and what became of the others.

    `total` counts all rows; `truncated` those that were cut and are still trained, `dropped` those whose
    trained tokens all lay beyond the cut; `lengths` are in tokens, before the cut.
    """

    rows: tuple[TokenRow, ...]
    total: int
    bad: int
    truncated: int
    dropped: int
    lengths: tuple[int, ...]


def load_files(sources: Sequence[Source], encoder: SampleEncoder, max_seq_length: int) -> LoadedFile:
    """The rows of files, one behind the other; raises DataError as `load_file` does, for each by itself."""
    files = [load_file(source, encoder, max_seq_length) for source in sources]
    before = accumulate((file.total for file in files), initial=0)
    return LoadedFile(
        rows=tuple(
            evolve(row, number=start + row.number)
            for start, file in zip(before, files, strict=False)
            for row in file.rows
        ),
        total=sum(file.total for file in files),
        bad=sum(file.bad for file in files),
        truncated=sum(file.truncated for file in files),
        dropped=sum(file.dropped for file in files),
        lengths=tuple(length for file in files for length in file.lengths),
    )


def load_file(source: Source, encoder: SampleEncoder, max_seq_length: int) -> LoadedFile:
    """Read, check, encode and cut the rows of a file.

    Raises DataError where the file cannot be read, more than 5 % of its rows are bad, or no row can be trained.
    """
    path = source.location
    samples, bad, total = parse_file(source)
    refuse_bad_rows(path, bad, total)
    tell_control_tokens(source, samples, encoder)
    whole: list[TokenRow] = []
    for row in encode_rows(samples, encoder):
        if isinstance(row, TokenRow):
            whole.append(row)
        else:
            number, reason = row
            bad[number] = reason
    refuse_bad_rows(path, bad, total)
    tell(f"{source.name}: skipped a bad row", [bad[number] for number in sorted(bad)])
    rows, dropped = cut_rows(source, whole, max_seq_length)
    truncated = sum(len(row) > max_seq_length for row in whole) - dropped
    return LoadedFile(rows, total, len(bad), truncated, dropped, tuple(map(len, whole)))


def cut_rows(file: Source, whole: Sequence[TokenRow], max_seq_length: int) -> tuple[tuple[TokenRow, ...], int]:
    """Rows cut to `max_seq_length` that are still trained, and how many are not; raises DataError if none is."""
    cut = [row.cut(max_seq_length) for row in whole]
    dropped = [row.source for row in cut if not row.trained.any()]
    if len(dropped) == len(cut):
        raise DataError(
            f"No row of {file.location} has a trained token within max_seq_length={max_seq_length}: the prompts alone "
            f"are longer. Raise max_seq_length (the longest row has {max(map(len, whole)):,} tokens) or shorten them."
        )
    tell(f"{file.name}: dropped a row with no trained token within max_seq_length={max_seq_length}", dropped)
    return tuple(row for row in cut if row.trained.any()), len(dropped)


Located = tuple[int, str, Sample]
"""A row's number in the file, its source and its sample."""


def parse_file(file: Source) -> tuple[list[Located], dict[int, str], int]:
    """Samples of a file, what is wrong with each bad row by its number, and the number of all rows."""
    samples: list[Located] = []
    bad: dict[int, str] = {}
    formats: Counter[str] = Counter()
    number = -1
    for number, line in enumerate(file.lines()):
        source = f"{file.name}:{line.number}"
        try:
            if isinstance(line.value, RowError):
                raise line.value
            name = detect_format(line.value)
            samples.append((number, source, FORMATS[name].parse(line.value)))
            formats[name] += 1
        except RowError as error:
            bad[number] = f"{source}: {error}"
    logger.info(
        "%s: %s",
        file.location,
        ", ".join(f"{count:,} {name} rows" for name, count in formats.most_common()) or "no row",
    )
    return samples, bad, number + 1


def encode_rows(samples: Sequence[Located], encoder: SampleEncoder) -> Iterator[TokenRow | tuple[int, str]]:
    """A TokenRow for each sample, or its number and what is wrong with it."""
    for start in range(0, len(samples), ENCODED_TOGETHER):
        part = samples[start : start + ENCODED_TOGETHER]
        for (number, source, _), result in zip(part, encoder.encode([s for _, _, s in part]), strict=True):
            if isinstance(result, Tokens):
                yield TokenRow(source, number, result.ids, result.trained)
            else:
                yield number, f"{source}: {result}"


def refuse_bad_rows(path: str, bad: Mapping[int, str], total: int) -> None:
    """Raise DataError with the first bad rows where they are more than 5 % of all."""
    if len(bad) > MAX_BAD_SHARE * total:
        first = "".join(f"\n  {bad[number]}" for number in sorted(bad)[:TOLD])
        more = f"\n  and {len(bad) - TOLD:,} more" if len(bad) > TOLD else ""
        raise DataError(
            f"{path}: {len(bad):,} of {total:,} rows cannot be used, more than {MAX_BAD_SHARE:.0%}. "
            f"Repair them or take them out:{first}{more}"
        )


def tell(what: str, rows: Sequence[str]) -> None:
    """Warn of `rows` one by one, of those beyond the first ten by their number."""
    for row in rows[:TOLD]:
        logger.warning("%s: %s", what, row)
    if len(rows) > TOLD:
        logger.warning("%s: and %d more, %d in all", what, len(rows) - TOLD, len(rows))


def tell_control_tokens(file: Source, samples: Sequence[Located], encoder: SampleEncoder) -> None:
    """Warn of `text` rows that spell control tokens, as chats written out by a template do: they stay plain text."""
    rows = [
        (source, token)
        for _, source, sample in samples
        if isinstance(sample, Text) and (token := encoder.encoder.spelled_control(sample.text))
    ]
    if rows:
        logger.warning(
            "%s: %d text rows spell control tokens, first %s with %s. They are read as plain text; "
            "give chats as messages rows to have control tokens written",
            *(file.name, len(rows), *rows[0]),
        )


def check_vocabulary(rows: Iterable[TokenRow], vocabulary_size: int, encoder: SampleEncoder) -> None:
    """Raise DataError at the first id that the model's embedding does not have; MLX would read past its end."""
    for row in rows:
        id = int(row.ids.max())
        if id >= vocabulary_size:
            raise DataError(
                f"{row.source}: token {encoder.encoder.token(id)!r} has id {id}, but the model's vocabulary ends at "
                f"{vocabulary_size - 1}. Tokenizer and model do not belong together: load the model's own tokenizer, "
                "or enlarge its embedding."
            )
