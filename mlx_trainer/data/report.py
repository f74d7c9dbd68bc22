"""What the rows become, told before the first step: figures, warnings, and rows with their trained tokens marked."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import asdict, frozen

from mlx_trainer.data.example import BEGIN, END, Example
from mlx_trainer.data.loader import Layout
from mlx_trainer.data.pipeline import DataPipeline
from mlx_trainer.data.shapes import Shape
from mlx_trainer.data.summary import DataSummary

MAX_PADDING_SHARE = 0.25
MIN_TRAINED_SHARE = 0.01


@frozen
class DataReport:
    """The counts of `summary`, and what they mean for training.

    `batches`, `shapes` (distinct ones, each compiled once), `epoch_tokens` and `epoch_positions` (tokens and padding)
    are those of the training batches of epoch 0; steps are optimizer steps, `total_steps` those of the whole run.
    """

    summary: DataSummary
    batches: int
    shapes: int
    epoch_tokens: int
    epoch_positions: int
    steps_per_epoch: int
    total_steps: int
    layout: Layout = "padded"
    examples: tuple[Example, ...] = ()

    @property
    def trained_share(self) -> float:
        """Trained tokens among all tokens, 0 to 1."""
        return self.summary.trained_tokens / self.summary.tokens

    @property
    def padding_share(self) -> float:
        """Padding among all positions of an epoch, 0 to 1."""
        return 1 - self.epoch_tokens / self.epoch_positions

    @property
    def positions_per_token(self) -> float:
        """Positions computed for each real token of an epoch; 1 is no padding."""
        return self.epoch_positions / self.epoch_tokens

    def lines(self) -> list[str]:
        """All figures as text: those of the summary, then those of `epoch_lines`."""
        return [*str(self.summary).splitlines(), *self.epoch_lines()]

    def epoch_lines(self) -> list[str]:
        """The figures that the summary has not, as text."""
        shapes = f"{self.shapes:,} {'shape, compiled once' if self.shapes == 1 else 'shapes, each compiled once'}"
        return [
            f"{self.trained_share:.1%} of the tokens are trained",
            f"batches per epoch: {self.batches:,} of {shapes}; {self.padding_share:.1%} padding, "
            f"{self.positions_per_token:.2f} positions computed per token",
            f"optimizer steps: {self.steps_per_epoch:,} per epoch, {self.total_steps:,} in all",
        ]

    def figures(self) -> dict[str, Any]:
        """All figures by name; shares are fractions."""
        return asdict(self.summary) | {
            "trained_share": self.trained_share,
            "batches": self.batches,
            "layout": self.layout,
            "shapes": self.shapes,
            "padding_share": self.padding_share,
            "positions_per_token": self.positions_per_token,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }

    def as_dict(self) -> dict[str, Any]:
        """Figures, warnings and examples as JSON values."""
        examples = [{"source": row.source, "spans": [asdict(span) for span in row.spans]} for row in self.examples]
        return self.figures() | {"warnings": warnings_of(self), "examples": examples}


def report_on(
    pipeline: DataPipeline,
    *,
    accumulate: int = 1,
    epochs: int = 1,
    max_steps: int | None = None,
    examples: Sequence[Example] = (),
) -> DataReport:
    """The report of a run of `epochs` passes, at most `max_steps` steps of `accumulate` batches each.

    The figures come from lengths and the plan alone, so that no batch is made for them.
    """
    loader = pipeline.train_loader()
    planned = loader.plan(0)
    steps = math.ceil(len(planned) / accumulate)
    positions = np.array([positions_of(shape, loader.layout) for shape in planned.shapes], np.int64)
    lengths = loader.rows.lengths[loader.row_numbers(0, planned.order)]
    return DataReport(
        summary=pipeline.summary,
        batches=len(planned),
        shapes=loader.shapes,
        epoch_tokens=int(lengths.sum(dtype=np.int64)),
        epoch_positions=int(positions[planned.classes].sum()),
        steps_per_epoch=steps,
        total_steps=epochs * steps if max_steps is None else min(epochs * steps, max_steps),
        layout=loader.layout,
        examples=tuple(examples),
    )


def positions_of(shape: Shape, layout: Layout) -> int:
    """The positions that a batch computes."""
    return shape.tokens if layout == "unpadded" else shape.rows * shape.length


def warnings_of(report: DataReport) -> list[str]:
    """A sentence for each thing that is likely to be wrong, with what would be right."""
    found = (*row_warnings(report.summary), *batch_warnings(report))
    return [sentence for applies, sentence in found if applies]


Warnings = tuple[tuple[bool, str], ...]
"""Whether each sentence applies."""


def row_warnings(summary: DataSummary) -> Warnings:
    """Rows that cannot be used, lose something, or are there twice."""
    longer = f"raise model.max_seq_length (the longest row has {summary.length_max:,} tokens) or shorten them"
    counts = (
        (summary.bad_rows, "rows cannot be used; repair them"),
        (summary.truncated_rows, f"rows were cut at the maximum length; {longer}"),
        (summary.dropped_rows, f"rows were dropped, as nothing was left to train; {longer}"),
        (summary.duplicate_rows, "rows repeat an earlier one and weigh as much again; drop them unless that is meant"),
    )
    leaks = (
        f"{summary.leaked_rows:,} of {summary.validation_rows:,} rows held out are trained too, so that the held-out "
        "loss is too low; keep each row on one side"
    )
    told = tuple((count > 0, f"{count:,} of {summary.rows:,} {what}") for count, what in counts)
    return (*told, (summary.leaked_rows > 0, leaks))


def batch_warnings(report: DataReport) -> Warnings:
    """Batches that cost more than they need, or train next to nothing."""
    return (
        (
            report.padding_share > MAX_PADDING_SHARE,
            f"{report.padding_share:.1%} of the positions are padding, more than {MAX_PADDING_SHARE:.0%}; "
            "each row is padded to the next of few lengths: a larger data.max_shapes or a smaller training.batch_size "
            "gives less",
        ),
        (
            report.trained_share < MIN_TRAINED_SHARE,
            f"{report.trained_share:.1%} of the tokens are trained, less than {MIN_TRAINED_SHARE:.0%}; "
            "shorten the prompts, or give longer answers",
        ),
    )


def show(report: DataReport) -> None:
    """Print lines, warnings and examples on stdout: trained text in green, or between markers where colour is off."""
    from rich.console import Console

    console = Console(highlight=False)
    for line in (*report.lines(), *(f"warning: {sentence}" for sentence in warnings_of(report))):
        print(line)
    plain = console.color_system is None or console.no_color
    for example in report.examples:
        print(f"\n{example.source}, trained {f'between {BEGIN} and {END}' if plain else 'in green'}:")
        if plain:
            print(example.plain())
        else:
            console.print(example.coloured(), soft_wrap=True)
