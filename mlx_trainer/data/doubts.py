"""What of the rows and their batches is likely to be wrong: a sentence each, with what would be right."""

from mlx_trainer.data.summary import DataSummary

MAX_PADDING_SHARE = 0.25
MIN_TRAINED_SHARE = 0.01

Doubts = tuple[tuple[bool, str], ...]
"""Whether each sentence applies."""


def row_doubts(summary: DataSummary) -> Doubts:
    """Rows that cannot be used, lose something, or are there twice."""
    longer = f"raise model.max_seq_length (the longest row has {summary.length_max:,} tokens) or shorten them"
    counts = (
        (summary.bad_rows, "rows cannot be used; repair them"),
        (summary.truncated_rows, f"rows were cut at the maximum length; {longer}"),
        (summary.dropped_rows, f"rows were dropped for their length; {longer}"),
        (summary.duplicate_rows, "rows repeat an earlier one and weigh as much again; drop them unless that is meant"),
    )
    leaks = (
        f"{summary.leaked_rows:,} of {summary.validation_rows:,} rows held out are trained too, so that the held-out "
        "loss is too low; keep each row on one side"
    )
    told = tuple((count > 0, f"{count:,} of {summary.rows:,} {what}") for count, what in counts)
    return (*told, (summary.leaked_rows > 0, leaks))


def batch_doubts(padding_share: float, trained_share: float) -> Doubts:
    """Batches that cost more than they need, or train next to nothing."""
    return (
        (
            padding_share > MAX_PADDING_SHARE,
            f"{padding_share:.1%} of the positions are padding, more than {MAX_PADDING_SHARE:.0%}; "
            "each row is padded to the next of few lengths: smaller batches give less, and where all data.max_shapes "
            "shapes are in use, more of them",
        ),
        (
            trained_share < MIN_TRAINED_SHARE,
            f"{trained_share:.1%} of the tokens are trained, less than {MIN_TRAINED_SHARE:.0%}; "
            "shorten the prompts, or give longer answers",
        ),
    )
