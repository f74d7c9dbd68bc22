"""Writing a token store: one pass over the rows, in memory that does not grow with them."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from mlx_trainer.data.conversation import RowError, Sample, Text
from mlx_trainer.data.formats import FORMATS, detect_format
from mlx_trainer.data.jsonl import Line
from mlx_trainer.data.recipe import Recipe
from mlx_trainer.data.store import FACTS, NOTES, ROW, StoreFacts
from mlx_trainer.data.tokenizer import Tokens
from mlx_trainer.data.truncation import fit

TOLD = 10
"""So many rows of a kind are told one by one, the others as a count."""

Parsed = tuple[Line, int, Sample]
"""A line, the row's number among all rows, and what it holds."""


class StoreWriter:
    """Fills a folder with a store; what was written counts only after `finish`."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder, self.recipe = folder, recipe
        self._ids_type = np.dtype(np.uint16 if recipe.encoder.encoder.largest_id < 2**16 else np.uint32)
        self._stack = ExitStack()
        names = ("ids.bin", "trained.bin", "rows.bin", NOTES)
        self._ids, self._trained, self._rows, self._notes = (
            self._stack.enter_context((folder / name).open("wb")) for name in names
        )
        self._total = self._tokens = self._largest_id = self._count = self._trained_tokens = 0
        self._lengths: Counter[int] = Counter()
        self._formats: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._told: dict[str, list[tuple[int, str]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, lines: Sequence[Line]) -> None:
        """Append the rows of some lines, encoded together."""
        parsed = [row for line in lines if (row := self._parse(line)) is not None]
        kept: list[tuple[Tokens, Line, int, int]] = []
        for (line, number, sample), result in zip(
            parsed, self.recipe.encoder.encode([sample for *_, sample in parsed]), strict=True
        ):
            if isinstance(result, RowError):
                self._note("bad", line, str(result))
            elif len(result.ids) <= self.recipe.max_seq_length:
                self._lengths[len(result.ids)] += 1
                kept.append((result, line, number, 0))
            else:
                self._lengths[len(result.ids)] += 1
                parts = self._fit(sample, result, line)
                kept += [(part, line, number, k) for k, part in enumerate(parts, start=int(len(parts) > 1))]
        self._write(kept)

    def finish(self) -> StoreFacts:
        """Write what is left, and the facts last; all of it is on the disk when this returns."""
        for file in (self._ids, self._trained, self._rows, self._notes):
            file.flush()
            os.fsync(file.fileno())
        facts = StoreFacts(
            rows=self._count,
            total=self._total,
            tokens=self._tokens,
            trained_tokens=self._trained_tokens,
            largest_id=self._largest_id,
            id_bytes=self._ids_type.itemsize,
            lengths=dict(self._lengths),
            formats=dict(self._formats.most_common()),
            counts=dict(self._counts),
            told=self._told,
        )
        with (self.folder / FACTS).open("w", encoding="utf-8") as written:
            written.write(facts.to_json())
            written.flush()
            os.fsync(written.fileno())
        return facts

    def _parse(self, line: Line) -> Parsed | None:
        number, self._total = self._total, self._total + 1
        try:
            if isinstance(line.value, RowError):
                raise line.value
            row = self.recipe.mapping.apply(line.value)
            name = detect_format(row)
            sample = FORMATS[name].parse(row)
        except RowError as error:
            self._note("bad", line, str(error))
            return None
        self._formats[name] += 1
        if isinstance(sample, Text) and (token := self.recipe.encoder.encoder.spelled_control(sample.text)):
            self._note("control", line, token)
        return line, number, sample

    def _fit(self, sample: Sample, tokens: Tokens, line: Line) -> list[Tokens]:
        recipe = self.recipe
        parts = fit(sample, tokens, recipe.encoder, recipe.max_seq_length, recipe.truncation)
        kind = ("dropped", "truncated", "split")[min(len(parts), 2)]
        self._note(kind, line, f"{len(tokens.ids)} tokens")
        return parts

    def _note(self, kind: str, line: Line, reason: str) -> None:
        self._counts[kind] += 1
        told = self._told.setdefault(kind, [])
        if len(told) < TOLD:
            told.append((line.number, reason))
        note = {"line": line.number, "kind": kind, "reason": reason}
        self._notes.write(json.dumps(note).encode() + b"\n")

    def _write(self, kept: Sequence[tuple[Tokens, Line, int, int]]) -> None:
        if not kept:
            return
        ids = np.concatenate([tokens.ids for tokens, *_ in kept])
        trained = np.concatenate([tokens.trained for tokens, *_ in kept])
        rows = np.zeros(len(kept), ROW)
        rows["length"] = lengths = [len(tokens.ids) for tokens, *_ in kept]
        starts = np.cumsum([0, *lengths])
        rows["start"] = self._tokens + starts[:-1]
        rows["trained"] = np.add.reduceat(trained, starts[:-1], dtype=np.int64)
        rows["line"] = [line.number for _, line, _, _ in kept]
        rows["number"] = [number for _, _, number, _ in kept]
        rows["part"] = [part for *_, part in kept]
        rows["digest"] = [digest_of(tokens) for tokens, *_ in kept]
        self._ids.write(ids.astype(self._ids_type).tobytes())
        self._trained.write(trained.tobytes())
        self._rows.write(rows.tobytes())
        self._count += len(kept)
        self._tokens += len(ids)
        self._trained_tokens += int(rows["trained"].sum())
        self._largest_id = max(self._largest_id, int(ids.max()))


def digest_of(tokens: Tokens) -> int:
    """64 bits that are the same for rows of the same ids and mask, and for a pair in 2⁶⁴ of others."""
    digest = hashlib.blake2b(tokens.ids.tobytes(), digest_size=8)
    digest.update(tokens.trained.tobytes())
    return int.from_bytes(digest.digest(), "little")
