"""What was read: counts that are logged before training starts."""

from collections.abc import Sequence

import numpy as np
from attrs import frozen

from mlx_trainer.data.duplicates import count_repeats
from mlx_trainer.data.rows import LoadedFile, TokenRow


@frozen
class DataSummary:
    """Counts over all files, in rows and tokens.

    `truncated_rows` were cut and are still trained; `dropped_rows` had no trained token left. `duplicate_rows` have
    the ids and mask of an earlier row on their side, `leaked_rows` are held out and trained too. `tokens` and
    `trained_tokens` are those of one epoch over all rows in use, validation included. Lengths are in tokens before
    cutting, so that they tell whether max_seq_length fits.
    """

    rows: int
    bad_rows: int
    truncated_rows: int
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

    def __str__(self) -> str:
        unused = f"{self.bad_rows:,} bad, {self.dropped_rows:,} dropped, {self.truncated_rows:,} truncated"
        twice = f"{self.duplicate_rows:,} duplicates; {self.leaked_rows:,} of the rows held out are trained too\n"
        return (
            f"{self.rows:,} rows ({unused}): {self.train_rows:,} to train on, {self.validation_rows:,} held out\n"
            f"{twice if self.duplicate_rows or self.leaked_rows else ''}"
            f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained; "
            f"lengths p50 {self.length_p50:,}, p95 {self.length_p95:,}, longest {self.length_max:,}"
        )


def summarize(
    files: Sequence[LoadedFile], train: Sequence[TokenRow], validation: Sequence[TokenRow], leaked_rows: int
) -> DataSummary:
    """The summary of `files`, whose rows were put into `train` and `validation`, `leaked_rows` of them into both."""
    p50, p95, longest = np.percentile(
        [length for file in files for length in file.lengths], [50, 95, 100], method="inverted_cdf"
    )
    return DataSummary(
        rows=sum(file.total for file in files),
        bad_rows=sum(file.bad for file in files),
        truncated_rows=sum(file.truncated for file in files),
        dropped_rows=sum(file.dropped for file in files),
        train_rows=len(train),
        validation_rows=len(validation),
        duplicate_rows=count_repeats(train) + count_repeats(validation),
        leaked_rows=leaked_rows,
        tokens=sum(len(row) for row in (*train, *validation)),
        trained_tokens=sum(row.trained_tokens for row in (*train, *validation)),
        length_p50=int(p50),
        length_p95=int(p95),
        length_max=int(longest),
    )
