"""One row of a batch, or a pair: the batch as it was computed, with the labels of that row and of no other."""

from collections.abc import Sequence

import numpy as np
from attrs import evolve

from mlx_trainer.data.batches.padded import IGNORED, Batch
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.data.store.store import TokenRow


def alone(batch: Batch | UnpaddedBatch, rows: Sequence[TokenRow], number: int) -> Batch | UnpaddedBatch:
    """`batch`, which was made of `rows`, with the labels of row `number` alone, or of the pair that it belongs to.

    Nothing else of it changes, so that every value up to the labels is computed as in the whole batch.
    """
    each = 2 if batch.metadata.pairs else 1
    first = number // each * each
    if isinstance(batch, Batch):
        labels = np.full_like(batch.labels, IGNORED)
        labels[first : first + each] = batch.labels[first : first + each]
        return evolve(batch, labels=labels)
    ends = np.cumsum([0, *(row.trained_tokens for row in rows)])  # the predictions stand in the order of the rows
    own = slice(ends[first], ends[first + each])
    weights = np.zeros_like(batch.weights)
    weights[own] = batch.weights[own]
    return evolve(batch, weights=weights)
