"""A batch: rows padded on the right, with the labels that are trained."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from mlx_trainer.data.rows import TokenRow
from mlx_trainer.data.tokenizer import IntArray

IGNORED = -100
"""Label of a position that is not trained, as in Hugging Face's convention."""

LENGTH_STEP = 32
"""Batches are padded to a multiple of this: each distinct shape costs a trace and a compilation."""


@frozen
class BatchMetadata:
    """Where the rows came from (`chats.jsonl:12`), and how many tokens and trained tokens they hold."""

    rows: tuple[str, ...]
    tokens: int
    trained_tokens: int


@frozen(eq=False)
class Batch:
    """Arrays of shape (rows, length), int32.

    `labels` stand where their ids stand, the model shifts them; no padding, no prompt and no first position has a
    label other than `IGNORED`. `attention_mask` is 1 for a token, 0 for padding.
    """

    input_ids: IntArray
    attention_mask: IntArray
    labels: IntArray
    metadata: BatchMetadata


def padded_length(length: int, max_seq_length: int) -> int:
    """The length to which a batch is padded whose longest row has `length` tokens.

    >>> padded_length(33, 2048), padded_length(64, 2048), padded_length(97, 100)
    (64, 64, 100)
    """
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, max_seq_length)


def collate(rows: Sequence[TokenRow], *, max_seq_length: int, pad_id: int = 0) -> Batch:
    """The batch of `rows`, none longer than `max_seq_length`."""
    shape = len(rows), padded_length(max(map(len, rows)), max_seq_length)
    input_ids = np.full(shape, pad_id, dtype=np.int32)
    attention_mask = np.zeros(shape, dtype=np.int32)
    labels = np.full(shape, IGNORED, dtype=np.int32)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row.ids
        attention_mask[i, : len(row)] = 1
        labels[i, : len(row)] = np.where(row.trained, row.ids, IGNORED)
    metadata = BatchMetadata(
        rows=tuple(row.source for row in rows),
        tokens=sum(map(len, rows)),
        trained_tokens=sum(row.trained_tokens for row in rows),
    )
    return Batch(input_ids, attention_mask, labels, metadata)
