"""What was read: counts that are logged before training starts."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from attrs import frozen

from mlx_trainer.data.duplicates import count_repeats
from mlx_trainer.data.store.rows import Rows
from mlx_trainer.data.store.store import TokenStore


@frozen
class DataSummary:
    """Counts over all files, in rows and tokens.

    `truncated_rows` were cut and are still trained, `split_rows` are several rows now, `dropped_rows` had no trained
    token left or were not to be cut. `train_rows` and `validation_rows` count what is in use. `duplicate_rows` have
    the ids and mask of an earlier row on their side, `leaked_rows` are held out and trained too. `tokens` and
    `trained_tokens` are those of one epoch over all rows in use, validation included. Lengths are in tokens before
    cutting, so that they tell whether max_seq_length fits.

    Of preferences each row is a pair; lengths are then those of both its sides, and `chosen_tokens` and
    `rejected_tokens` the trained tokens of each side of the pairs in use.
    """

    rows: int
    bad_rows: int
    truncated_rows: int
    split_rows: int
    dropped_rows: int
    train_rows: int
    validation_rows: int
    duplicate_rows: int
    leaked_rows: int
    tokens: int
    trained_tokens: int
    length_p50: int
    length_p95: int
    length_max: int
    chosen_tokens: int = 0
    rejected_tokens: int = 0

    def __str__(self) -> str:
        unused = f"{self.bad_rows:,} bad, {self.dropped_rows:,} dropped, {self.truncated_rows:,} truncated"
        unused += f", {self.split_rows:,} split" if self.split_rows else ""
        twice = f"{self.duplicate_rows:,} duplicates; {self.leaked_rows:,} of the rows held out are trained too\n"
        pairs = self.train_rows + self.validation_rows if self.chosen_tokens else 0
        means = [f"{tokens / max(pairs, 1):,.1f}" for tokens in (self.chosen_tokens, self.rejected_tokens)]
        return (
            f"{self.rows:,} rows ({unused}): {self.train_rows:,} to train on, {self.validation_rows:,} held out\n"
            f"{twice if self.duplicate_rows or self.leaked_rows else ''}"
            f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained; "
            f"lengths p50 {self.length_p50:,}, p95 {self.length_p95:,}, longest {self.length_max:,}"
            + (f"\nchosen answers have {means[0]} tokens on average, rejected ones {means[1]}" if pairs else "")
        )


def summarize(stores: Sequence[TokenStore], train: Rows, validation: Rows, leaked_rows: int) -> DataSummary:
    """The summary of `stores`, whose rows were put into `train` and `validation`, `leaked_rows` of them into both."""
    lengths: Counter[int] = Counter()
    counts: Counter[str] = Counter()
    for store in stores:
        lengths.update(store.facts.lengths)
        counts.update(store.facts.counts)
    p50, p95, longest = percentiles(lengths, 50, 95, 100)
    each, trained = train.each, [rows.column("trained") for rows in (train, validation)]
    first, second = (sum(int(column[side::each].sum(dtype=np.int64)) for column in trained) for side in (0, each - 1))
    return DataSummary(
        rows=sum(store.facts.total for store in stores),
        bad_rows=counts["bad"],
        truncated_rows=counts["truncated"],
        split_rows=counts["split"],
        dropped_rows=counts["dropped"],
        train_rows=len(train) // each,
        validation_rows=len(validation) // each,
        duplicate_rows=count_repeats(train) + count_repeats(validation),
        leaked_rows=leaked_rows,
        tokens=int(train.lengths.sum(dtype=np.int64) + validation.lengths.sum(dtype=np.int64)),
        trained_tokens=first + second if each == 2 else first,
        length_p50=p50,
        length_p95=p95,
        length_max=longest,
        chosen_tokens=first if each == 2 else 0,
        rejected_tokens=second if each == 2 else 0,
    )


def percentiles(counts: Mapping[int, int], *wanted: float) -> list[int]:
    """The smallest values up to which the `wanted` percentages of all lie; `counts` says how often each value is there.

    >>> percentiles({3: 1, 5: 2, 9: 1}, 25, 50, 100)
    [3, 5, 9]
    """
    values = np.array(sorted(counts))
    up_to = np.cumsum([counts[value] for value in values.tolist()])
    return [int(values[np.searchsorted(up_to, up_to[-1] * percent / 100)]) for percent in wanted]
