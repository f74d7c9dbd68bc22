"""What the rows become, told before the first step: figures, warnings, and rows with their trained tokens marked."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import asdict, frozen

from mlx_trainer.data.batches.loader import BatchLayout
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.doubts import batch_doubts, row_doubts
from mlx_trainer.data.example import Example, show_examples
from mlx_trainer.data.pipeline import DataPipeline
from mlx_trainer.data.summary import DataSummary

TOLD_SHAPES = 16
"""A line tells at most so many shapes, the default of data.max_shapes."""


@frozen
class UsedShape:
    """A shape of batches: `rows` of `length` tokens each, of which `positions` are computed, in so many `batches`.

    With a `prefix`, each row has so many tokens more, which are computed once for several rows.
    """

    rows: int
    length: int
    positions: int
    batches: int
    prefix: int = 0

    def __str__(self) -> str:
        return f"{self.rows}×({self.prefix}+{self.length})" if self.prefix else f"{self.rows}×{self.length}"


@frozen
class DataReport:
    """The counts of `summary`, and what they mean for training.

    `batches`, `shapes` (how many distinct ones, each compiled once), `used_shapes` (shortest first), `epoch_tokens` and
    `epoch_positions` (tokens and padding) are those of the training batches of epoch 0, `shared_tokens` the tokens that
    are not computed again as several rows begin with them; steps are optimizer steps, `total_steps` those of the whole
    run. Unpadded batches have up to two shapes for each of the `used_shapes`.
    """

    summary: DataSummary
    batches: int
    shapes: int
    used_shapes: tuple[UsedShape, ...]
    epoch_tokens: int
    epoch_positions: int
    steps_per_epoch: int
    total_steps: int
    layout: BatchLayout = "padded"
    shared_tokens: int = 0
    examples: tuple[Example, ...] = ()

    @property
    def trained_share(self) -> float:
        """Trained tokens among all tokens, 0 to 1."""
        return self.summary.trained_tokens / self.summary.tokens

    @property
    def padding_share(self) -> float:
        """Padding among all positions of an epoch, 0 to 1."""
        return 1 - (self.epoch_tokens - self.shared_tokens) / self.epoch_positions

    @property
    def positions_per_token(self) -> float:
        """Positions computed for each real token of an epoch; 1 is no padding, less where prefixes are shared."""
        return self.epoch_positions / self.epoch_tokens

    def lines(self) -> list[str]:
        """All figures as text: those of the summary, then those of `epoch_lines`."""
        return [*str(self.summary).splitlines(), *self.epoch_lines()]

    def epoch_lines(self) -> list[str]:
        """The figures that the summary has not, as text."""
        shared = f"{self.shared_tokens / self.epoch_tokens:.1%} of the tokens stand in prefixes that rows share, "
        shapes = f"{self.shapes:,} {'shape, compiled once' if self.shapes == 1 else 'shapes, each compiled once'}"
        return [
            f"{self.trained_share:.1%} of the tokens are trained",
            f"batches per epoch: {self.batches:,}; {self.padding_share:.1%} padding, "
            f"{self.positions_per_token:.2f} positions computed per token",
            *([f"{shared}and are not computed again"] if self.shared_tokens else []),
            f"{shapes}: {', '.join(told(self.used_shapes))} rows×tokens",
            f"optimizer steps: {self.steps_per_epoch:,} per epoch, {self.total_steps:,} in all",
        ]

    def figures(self) -> dict[str, Any]:
        """All figures by name; shares are fractions."""
        return asdict(self.summary) | {
            "trained_share": self.trained_share,
            "batches": self.batches,
            "layout": self.layout,
            "shapes": self.shapes,
            "used_shapes": [asdict(shape) for shape in self.used_shapes],
            "padding_share": self.padding_share,
            "positions_per_token": self.positions_per_token,
            "shared_tokens": self.shared_tokens,
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
    used = np.bincount(planned.classes, minlength=len(planned.shapes)).tolist()
    return DataReport(
        summary=pipeline.summary,
        batches=len(planned),
        shapes=loader.shapes,
        used_shapes=tuple(
            UsedShape(shape.rows, shape.length, positions_of(shape, loader.layout), batches, shape.prefix)
            for shape, batches in zip(planned.shapes, used, strict=True)
            if batches
        ),
        epoch_tokens=int(lengths.sum(dtype=np.int64)),
        epoch_positions=int(positions[planned.classes].sum()),
        steps_per_epoch=steps,
        total_steps=epochs * steps if max_steps is None else min(epochs * steps, max_steps),
        layout=loader.layout,
        shared_tokens=sum(planned.shared_tokens),
        examples=tuple(examples),
    )


def positions_of(shape: Shape, layout: BatchLayout) -> int:
    """The positions that a batch computes."""
    return shape.tokens if layout == "unpadded" else shape.rows * shape.length


def told(shapes: Sequence[UsedShape]) -> list[str]:
    """The shapes as text; of more than `TOLD_SHAPES` the shortest and the longest, which cost the most memory."""
    texts = [str(shape) for shape in shapes]
    half = TOLD_SHAPES // 2
    return texts if len(texts) <= TOLD_SHAPES else [*texts[:half], "…", *texts[-half:]]


def warnings_of(report: DataReport) -> list[str]:
    """A sentence for each thing that is likely to be wrong, with what would be right."""
    found = (*row_doubts(report.summary), *batch_doubts(report.padding_share, report.trained_share))
    return [sentence for applies, sentence in found if applies]


def show(report: DataReport) -> None:
    """Print lines, warnings and examples on stdout: trained text in green, or between markers where colour is off."""
    from rich.console import Console

    for line in (*report.lines(), *(f"warning: {sentence}" for sentence in warnings_of(report))):
        print(line)
    show_examples(report.examples, Console())
