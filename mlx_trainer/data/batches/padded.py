"""A batch: rows padded on the right, with the labels that are trained."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from mlx_trainer.data.batches.halves import padded_halves
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.encoding.tokenizer import IntArray
from mlx_trainer.data.store.store import TokenRow

IGNORED = -100
"""Label of a position that is not trained, as in Hugging Face's convention."""


@frozen
class BatchMetadata:
    """Where the rows came from (`chats.jsonl:12`), how many tokens and trained tokens they hold.

    `positions` are the tokens that the model's layers compute, padding included; `shared_tokens` of the rows' tokens
    are not computed again, since another row begins with them too. Where there are `pairs`, rows 2i and 2i + 1 are the
    chosen and the rejected answer of the i-th.
    """

    rows: tuple[str, ...]
    tokens: int
    trained_tokens: int
    positions: int
    shared_tokens: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, rows: Sequence[TokenRow], positions: int, *, shared: int = 0) -> "BatchMetadata":
        """The metadata of a batch of `rows`."""
        tokens, trained = sum(map(len, rows)), sum(row.trained_tokens for row in rows)
        pairs = sum(row.side == "chosen" for row in rows)
        return cls(tuple(row.source for row in rows), tokens, trained, positions, shared, pairs)


@frozen(eq=False)
class Batch:
    """Arrays of shape (rows, length), int32.

    `labels` stand where their ids stand, the model shifts them; no padding, no prompt and no first position has a
    label other than `IGNORED`. `attention_mask` is 1 for a token, 0 for padding. The last rows may be padding alone.
    """

    input_ids: IntArray
    attention_mask: IntArray
    labels: IntArray
    metadata: BatchMetadata

    def halves(self) -> list["Batch"]:
        """Two batches of half the rows each, or this one alone."""
        return padded_halves(self)


def collate(rows: Sequence[TokenRow], shape: Shape, *, pad_id: int = 0) -> Batch:
    """The padded batch of `rows`, which `shape` must hold."""
    size = shape.rows, shape.length
    input_ids = np.full(size, pad_id, dtype=np.int32)
    attention_mask = np.zeros(size, dtype=np.int32)
    labels = np.full(size, IGNORED, dtype=np.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row.ids
        attention_mask[i, : len(row)] = 1
        labels[i, : len(row)] = np.where(row.trained, row.ids, IGNORED)
    return Batch(input_ids, attention_mask, labels, BatchMetadata.of(rows, shape.rows * shape.length))
