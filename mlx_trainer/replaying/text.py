"""A replayed step for people."""

import math

from mlx_trainer.data import show_examples
from mlx_trainer.replaying.step import ReplayedRow, ReplayedStep


def show(step: ReplayedStep, texts: int = 2) -> None:
    """Print the step, and the text of the `texts` rows with the highest loss."""
    from rich.console import Console

    print(as_text(step))
    worst = sorted(step.rows, key=surprise, reverse=True)[:texts]
    show_examples([row.example for row in worst], Console())


def as_text(step: ReplayedStep) -> str:
    """The figures for people, rows with the highest loss first."""
    tokens = sum(row.trained_tokens for row in step.rows)
    values = {"learning rate": step.learning_rate, **step.values}
    told = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if value is not None)
    rows = sorted(step.rows, key=surprise, reverse=True)
    return "\n".join(
        [
            f"step {step.step}, epoch {step.epoch + 1}: loss {step.loss:.4f} over {tokens:,} trained tokens; {told}; "
            f"the update was {'made' if step.accepted else 'refused'}",
            evidence(step),
            "",
            "    loss  trained  row",
            *(f"{row.loss:8.4f} {row.trained_tokens:8,}  {row.source}" for row in rows),
            "",
            "gradient norm  layer",
            *(f"{norm:13.4g}  {name}" for name, norm in step.gradient_norms.items()),
        ]
    )


def evidence(step: ReplayedStep) -> str:
    """How the step was reached, and what shows that it is the run's own."""
    begin = f"taken up at the checkpoint of step {step.begun_at}" if step.begun_at else "taken from the start"
    found = []
    for equal, word in ((True, "the same"), (False, "ANOTHER")):
        if steps := ", ".join(str(at) for at, same in step.logged.items() if same == equal):
            found.append(f"what was logged as the loss of step {steps} is {word}")
    if step.checkpoint_equal is not None:
        found.append(f"the parameters after it are {'' if step.checkpoint_equal else 'NOT '}those of its checkpoint")
    return "; ".join([begin, *found]) + (", bit for bit" if found else "; nothing on the way was logged or saved")


def surprise(row: ReplayedRow) -> float:
    """The loss, for sorting; NaN is above all."""
    return math.inf if math.isnan(row.loss) else row.loss
