"""Pairs in batches: chosen and rejected always together, and the prompt that they share computed once.

A pair is a unit of two rows. In an unpadded batch its rows begin with a prefix that is one length for the whole batch,
so pairs are put into few strata by how long a prompt they share; what is left of a longer prompt stands in both rows.
"""

from typing import Any

import numpy as np
from attrs import field, fields, frozen

from mlx_trainer.data.batches.classes import ROUNDS_PER_CLASS
from mlx_trainer.data.batches.mixing import Mixture
from mlx_trainer.data.batches.padded import Batch
from mlx_trainer.data.batches.shapes import Budget, Lengths, length_classes, round_up
from mlx_trainer.data.batches.strata import Stratum
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.data.encoding.tokenizer import FloatArray
from mlx_trainer.data.store.rows import Rows


@frozen(eq=False)
class ReferredBatch(Batch):
    """A padded batch with the log-probability of each answer under the `reference`, (rows,), 0 where there is none."""

    reference: FloatArray = field(kw_only=True)


@frozen(eq=False)
class ReferredUnpaddedBatch(UnpaddedBatch):
    """The same of an unpadded batch."""

    reference: FloatArray = field(kw_only=True)


def referred(batch: Batch | UnpaddedBatch, reference: FloatArray) -> Batch | UnpaddedBatch:
    """`batch` with the `reference` of its answers, (answers,)."""
    kind, rows = (ReferredBatch, batch.input_ids) if isinstance(batch, Batch) else (ReferredUnpaddedBatch, batch.grid)
    values: dict[str, Any] = {each.name: getattr(batch, each.name) for each in fields(type(batch))}
    return kind(**values, reference=np.append(reference, np.zeros(len(rows) - len(reference), np.float32)))


def pair_strata(rows: Rows, mixture: Mixture, budget: Budget, ranks: int = 1, *, share: bool) -> tuple[Stratum, ...]:
    """The strata of the pairs that `rows` are, in the places of `mixture`; they share prompts where `share` is set.

    With a padded budget a pair counts twice the longer of its rows, as both are padded to one length.
    """
    sides = rows.lengths.reshape(-1, 2).astype(np.int64)
    # The token that predicts an answer's first is computed for each row: it is never shared.
    common = rows.column("first").reshape(-1, 2).min(axis=1).astype(np.int64) - 1
    longest, prefixes = mixture.largest(sides.max(axis=1)), -mixture.largest(-common)
    sizes = mixture.largest(sides.sum(axis=1)) if budget.unpadded else 2 * longest
    levels = prompt_levels(prefixes, sizes, budget, ranks) if share else np.zeros_like(prefixes)
    strata = []
    for level in np.unique(levels).tolist():
        pairs = np.flatnonzero(levels == level)
        units = 2 * pairs[:, None] + np.arange(2)
        strata.append(Stratum(sizes[pairs] - level, longest[pairs] - level, units, level))
    return tuple(strata)


def prompt_levels(prefixes: Lengths, sizes: Lengths, budget: Budget, ranks: int) -> Lengths:
    """How many tokens of its prompt each pair shares: one of few numbers, at most its own of `prefixes`.

    Chosen as classes of lengths are, with lengths counted down from the longest prompt; each level has pairs for a few
    batches, but for the lowest, which has what is left.
    """
    if len(prefixes) == 0:
        return prefixes
    step = budget.length_step
    whole = prefixes // step * step
    top = round_up(int(whole.max()) + step, step)
    pairs = budget.rows // 2 if budget.rows is not None else (budget.tokens or 0) // max(int(sizes.mean()), 1)
    fewest = ROUNDS_PER_CLASS * ranks * max(pairs, 1)
    missing = length_classes(top - whole, max(budget.max_shapes // 2, 1), lambda _: fewest, step)
    levels = np.sort(np.maximum(top - missing, 0))
    found: Lengths = levels[np.searchsorted(levels, whole, side="right") - 1]
    return found
