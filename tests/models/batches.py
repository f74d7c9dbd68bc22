"""Batches as the models room sees them: uneven rows, padded on the right, with labels on the answers only."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from attrs import frozen

from mlx_trainer.models.loss import IGNORED


@frozen
class Sizes:
    rows: tuple[str, ...]
    tokens: int
    trained_tokens: int
    positions: int
    shared_tokens: int = 0


@frozen(eq=False)
class Labelled:
    input_ids: mx.array
    attention_mask: mx.array
    labels: mx.array
    metadata: Sizes | None = None


def labelled(lengths: Sequence[int] = (9, 5, 7), prompt: int = 3, *, padding: int = 0, seed: int = 0) -> Labelled:
    """A batch of distinct random rows of these lengths, the first `prompt` tokens of each without a label."""
    generator = np.random.default_rng(seed)
    ids = np.full((len(lengths), max(lengths)), padding, np.int32)
    mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for row, length in enumerate(lengths):
        ids[row, :length] = generator.integers(10, 380, length)
        mask[row, :length] = 1
        labels[row, prompt:length] = ids[row, prompt:length]
    names, trained = tuple(f"row {row}" for row in range(len(lengths))), sum(lengths) - prompt * len(lengths)
    sizes = Sizes(names, sum(lengths), trained, ids.size)
    return Labelled(mx.array(ids), mx.array(mask), mx.array(labels), sizes)
