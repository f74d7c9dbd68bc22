"""Token stores of rows that a test gives as ids and masks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.conversation import Sample, Text
from mlx_trainer.data.sources.jsonl import Line
from mlx_trainer.data.sources.mapping import FieldMapping
from mlx_trainer.data.store.parsing import parse_rows
from mlx_trainer.data.store.recipe import Recipe
from mlx_trainer.data.store.rows import Rows
from mlx_trainer.data.store.store import TokenStore
from mlx_trainer.data.store.writing import StoreWriter

Given = tuple[Sequence[int], Sequence[bool]]


class Verbatim:
    """Stands in for an encoder: a text is the JSON of its own ids and mask."""

    largest_id = 70_000

    def __init__(self, largest_id: int = 70_000) -> None:
        self.largest_id = largest_id

    @property
    def encoder(self) -> "Verbatim":
        return self

    def spelled_control(self, text: str) -> None:
        return None

    def encode(self, samples: Sequence[Sample]) -> list[Tokens]:
        return [Tokens.of(*json.loads(cast(Text, sample).text)) for sample in samples]


def write_store(folder: Path, rows: Sequence[Given], name: str = "chats.jsonl", largest_id: int = 70_000) -> TokenStore:
    """A store of `rows`, line i for the i-th from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(cast(Any, None), cast(Any, Verbatim(largest_id)), FieldMapping(), 1 << 20, "truncate")
    lines = [
        Line(i, {"text": json.dumps([list(ids), list(trained)])}) for i, (ids, trained) in enumerate(rows, start=1)
    ]
    with StoreWriter(folder, recipe) as writer:
        for start in range(0, len(lines), 7):
            writer.add(parse_rows(lines[start : start + 7], recipe))
        writer.finish()
    store = TokenStore.open(folder, name)
    assert store is not None
    return store


def distinct_rows(lengths: Sequence[int], prompt: int = 2) -> list[Given]:
    """Rows of these lengths whose ids tell row and place; the first `prompt` tokens are not trained."""
    return [
        ((np.arange(n) + 100 * i).tolist(), [k >= min(prompt, n - 1) for k in range(n)]) for i, n in enumerate(lengths)
    ]


def rows_of(folder: Path, lengths: Sequence[int], prompt: int = 2) -> Rows:
    """`distinct_rows` in one store."""
    return Rows.of([write_store(folder, distinct_rows(lengths, prompt))])
