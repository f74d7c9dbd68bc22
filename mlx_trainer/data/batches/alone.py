"""One row of a batch: the batch as it was computed, with the labels of that row and of no other."""

from collections.abc import Sequence

import numpy as np
from attrs import evolve

from mlx_trainer.data.batches.padded import IGNORED, Batch
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.data.store.store import TokenRow


def alone(batch: Batch | UnpaddedBatch, rows: Sequence[TokenRow], number: int) -> Batch | UnpaddedBatch:
    """`batch`, which was made of `rows`, with the labels of row `number` alone.

    Nothing else of it changes, so that every value up to the labels is computed as in the whole batch.
    """
    if isinstance(batch, Batch):
        labels = np.full_like(batch.labels, IGNORED)
        labels[number] = batch.labels[number]
        return evolve(batch, labels=labels)
    ends = np.cumsum([row.trained_tokens for row in rows])  # the predictions stand in the order of the rows
    own = slice(ends[number] - rows[number].trained_tokens, ends[number])
    weights = np.zeros_like(batch.weights)
    weights[own] = batch.weights[own]
    return evolve(batch, weights=weights)
