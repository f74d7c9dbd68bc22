"""Writing a token store: one pass over the rows, in memory that does not grow with them."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Self

import numpy as np

from mlx_trainer.data.encoding.pairs import Pair, encode_pairs, fit_pair
from mlx_trainer.data.encoding.tokenizer import BoolArray, IntArray, Tokens
from mlx_trainer.data.encoding.truncation import fit
from mlx_trainer.data.samples.conversation import RowError, Sample
from mlx_trainer.data.store.parsing import ParsedRow
from mlx_trainer.data.store.prefixes import find_prefixes
from mlx_trainer.data.store.recipe import Recipe
from mlx_trainer.data.store.store import FACTS, NOTES, ROW, MappedArray, StoreFacts

TOLD = 10
"""So many rows of a kind are told one by one, the others as a count."""

Kept = tuple[Tokens, int, int, int]
"""A row's tokens, its line, its number among all rows, and its part."""


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

    def add(self, rows: Sequence[ParsedRow]) -> None:
        """Append some rows, encoded together."""
        first, self._total = self._total, self._total + len(rows)
        usable: list[tuple[ParsedRow, Sample, int]] = []
        for number, row in enumerate(rows, start=first):
            if isinstance(row.sample, RowError):
                self._note("bad", row, str(row.sample))
                continue
            self._formats[row.format] += 1
            if row.control:
                self._note("control", row, row.control)
            usable.append((row, row.sample, number))
        samples = [sample for _, sample, _ in usable]
        pairs = self.recipe.pairs
        encoded = encode_pairs(samples, self.recipe.encoder) if pairs else self.recipe.encoder.encode(samples)
        kept: list[Kept] = []
        for (row, sample, number), tokens in zip(usable, encoded, strict=True):
            if isinstance(tokens, RowError):
                self._note("bad", row, str(tokens))
                continue
            sides = (tokens,) if isinstance(tokens, Tokens) else tokens
            lengths = [len(side.ids) for side in sides]
            self._lengths.update(lengths)
            parts: Sequence[Tokens] = sides
            if max(lengths) > self.recipe.max_seq_length:
                parts = self._fit(sample, tokens, row)
            kept += [(part, row.line, number, k) for k, part in enumerate(parts, start=int(len(parts) > 1))]
        if kept:
            self._write(kept)

    def finish(self) -> StoreFacts:
        """Write what is left, and the facts last; all of it is on the disk when this returns."""
        for file in (self._ids, self._trained, self._rows, self._notes):
            file.flush()
            os.fsync(file.fileno())
        self._write_prefixes()
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
            pairs=self.recipe.pairs,
        )
        with (self.folder / FACTS).open("w", encoding="utf-8") as written:
            written.write(facts.to_json())
            written.flush()
            os.fsync(written.fileno())
        return facts

    def _write_prefixes(self) -> None:
        rows = MappedArray.open(self.folder / "rows.bin", ROW, self._count)
        ids = MappedArray.open(self.folder / "ids.bin", self._ids_type, self._tokens)
        # What predicts the first trained token is computed for each row: the token before it is never shared.
        found = find_prefixes(ids, rows.field("start"), rows.field("first") - 1)
        with (self.folder / "prefixes.bin").open("wb") as written:
            written.write(found.tobytes())
            written.flush()
            os.fsync(written.fileno())

    def _fit(self, sample: Sample, tokens: Tokens | Pair, row: ParsedRow) -> Sequence[Tokens]:
        recipe, most = self.recipe, self.recipe.max_seq_length
        parts: Sequence[Tokens]
        if isinstance(tokens, Tokens):
            parts = fit(sample, tokens, recipe.encoder, most, recipe.truncation)
            kind, length = ("dropped", "truncated", "split")[min(len(parts), 2)], len(tokens.ids)
        else:
            parts = fit_pair(tokens, most, recipe.truncation, recipe.encoder.bos) or ()
            kind, length = "truncated" if parts else "dropped", max(len(side.ids) for side in tokens)
        self._note(kind, row, f"{length} tokens")
        return parts

    def _note(self, kind: str, row: ParsedRow, reason: str) -> None:
        self._counts[kind] += 1
        told = self._told.setdefault(kind, [])
        if len(told) < TOLD:
            told.append((row.line, reason))
        note = {"line": row.line, "kind": kind, "reason": reason}
        self._notes.write(json.dumps(note).encode() + b"\n")

    def _write(self, kept: Sequence[Kept]) -> None:
        tokens, lines, numbers, parts = zip(*kept, strict=True)
        ids = np.concatenate([row.ids for row in tokens])
        trained = np.concatenate([row.trained for row in tokens])
        lengths = [len(row.ids) for row in tokens]
        edges = np.cumsum([0, *lengths])
        rows = np.zeros(len(kept), ROW)
        rows["start"] = self._tokens + edges[:-1]
        rows["length"], rows["line"], rows["number"], rows["part"] = lengths, lines, numbers, parts
        rows["trained"] = np.add.reduceat(trained, edges[:-1], dtype=np.int64)
        places = np.append(np.flatnonzero(trained), len(trained))
        rows["first"] = np.minimum(places[np.searchsorted(places, edges[:-1])] - edges[:-1], lengths)
        rows["digest"] = digests(ids, trained, edges.tolist())
        self._ids.write(ids.astype(self._ids_type).tobytes())
        self._trained.write(trained.tobytes())
        self._rows.write(rows.tobytes())
        self._count += len(kept)
        self._tokens += len(ids)
        self._trained_tokens += int(rows["trained"].sum(dtype=np.int64))
        self._largest_id = max(self._largest_id, int(ids.max()))


def digests(ids: IntArray, trained: BoolArray, edges: Sequence[int]) -> list[int]:
    """64 bits for the row between each two `edges`: the same for the same ids and mask, and for a pair in 2⁶⁴ else."""
    letters, mask, size = ids.tobytes(), trained.tobytes(), ids.itemsize
    return [
        int.from_bytes(blake2b(letters[size * a : size * b] + mask[a:b], digest_size=8).digest(), "little")
        for a, b in pairwise(edges)
    ]
