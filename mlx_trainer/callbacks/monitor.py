"""A metric that decides something: what is best, and whether it still improves."""

import math
from collections.abc import Mapping
from typing import Literal

from attrs import frozen

from mlx_trainer.trainer import TrainingError

Mode = Literal["min", "max"]


@frozen
class Best:
    """The best value so far, and the step that had it."""

    step: int
    value: float


def check_mode(mode: str) -> Mode:
    """Return `mode`. Raises ValueError unless it is "min" or "max"."""
    match mode:
        case "min" | "max":
            return mode
    raise ValueError(f'mode is {mode!r}; it must be "min" (lower is better) or "max"')


def improves(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Whether `value` beats `best` by more than `min_delta`; NaN and infinity never do, and a tie is none.

    >>> improves(1.0, 1.5, "min"), improves(1.0, 1.5, "max"), improves(1.0, 1.0, "min"), improves(1.0, None, "max")
    (True, False, False, True)
    """
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def monitored(name: str, metrics: Mapping[str, float], owner: str) -> float:
    """Return the metric called `name`. Raises TrainingError, naming those that exist, where there is none."""
    if name not in metrics:
        raise TrainingError(f"{owner} monitors {name!r}, which was not measured; there are {', '.join(metrics)}")
    return metrics[name]
