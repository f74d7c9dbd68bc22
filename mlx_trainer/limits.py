"""When a run ends."""

from datetime import timedelta
from typing import Self

import attrs


@attrs.frozen
class Limits:
    """The ends that a run may come to; the first one counts. None is no limit."""

    max_epochs: int | None = None
    max_steps: int | None = None
    max_seconds: float | None = None

    @classmethod
    def of(cls, max_epochs: int | None, max_steps: int | None, max_time: float | timedelta | str | None) -> Self:
        """The limits as users give them; without any it is one epoch."""
        if max_epochs is None and max_steps is None and max_time is None:
            max_epochs = 1
        return cls(max_epochs, max_steps, None if max_time is None else seconds_of(max_time))

    def total_steps(self, steps_per_epoch: int) -> int | None:
        """How many steps there will be at most, or None where only time ends the run."""
        by_epochs = None if self.max_epochs is None else self.max_epochs * steps_per_epoch
        return min((limit for limit in (by_epochs, self.max_steps) if limit is not None), default=None)

    def reached(self, steps: int, epochs: int, seconds: float) -> str | None:
        """The limit that a run has come to after so many steps, whole epochs and seconds, in words."""
        if self.max_steps is not None and steps >= self.max_steps:
            return f"max_steps={self.max_steps} reached"
        if self.max_epochs is not None and epochs >= self.max_epochs:
            return f"max_epochs={self.max_epochs} reached"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return f"max_time={timedelta(seconds=self.max_seconds)} reached"
        return None


def at_least_one(**counts: int | None) -> None:
    """Raise ValueError for a count below 1; None is no limit."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")


def seconds_of(time_limit: float | timedelta | str) -> float:
    """Seconds of a number, a timedelta or "DD:HH:MM:SS" (leading parts may be left out). Raises ValueError.

    >>> seconds_of("01:30:00")
    5400.0
    """
    if isinstance(time_limit, timedelta):
        return time_limit.total_seconds()
    if not isinstance(time_limit, str):
        return float(time_limit)
    parts = time_limit.split(":")
    if len(parts) > 4 or not all(part.isdigit() for part in parts):
        raise ValueError(f'max_time is {time_limit!r}; give seconds, a timedelta, or "DD:HH:MM:SS"')
    return float(sum(int(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400), strict=False)))
