"""How long it takes until the first step is done."""

import time
from collections.abc import Mapping

import psutil
from attrs import frozen

from mlx_trainer.benchmarking.clock import Clock, StepClock


@frozen
class Start:
    """Seconds until the first step was computed, since the process and since the command began, and their parts.

    The parts, in order: `python` (the process, until the command), `imports`, `data` (rows read and encoded, or their
    store found; the epoch planned), `model` (weights loaded), `setup` (optimizer, first batches), `tracing` (traced,
    compiled, handed over) and `computing`.
    """

    from_process_s: float
    from_command_s: float
    parts: Mapping[str, float]


class Stopwatch:
    """Splits the time since `started` into named laps."""

    def __init__(self, started: float, now: Clock = time.perf_counter) -> None:
        self.started, self.now = started, now
        self.laps: dict[str, float] = {}
        self.last = started

    def lap(self, name: str) -> None:
        """What passed since the last lap was spent on `name`."""
        now = self.now()
        self.laps[name], self.last = now - self.last, now


def start_of(watch: Stopwatch, clock: StepClock, before_command_s: float) -> Start:
    """The start of a run whose laps until `fit` are in `watch`."""
    tracing = clock.steps[0].dispatch
    fit = {
        "setup": clock.first_start - watch.last,
        "tracing": tracing,
        "computing": clock.done[0] - clock.first_start - tracing,
    }
    from_command = clock.done[0] - watch.started
    parts = {"python": before_command_s, **watch.laps, **fit}
    return Start(before_command_s + from_command, from_command, parts)


def process_age_s() -> float:
    """How long ago this process began; the system's clock tells it to a hundredth of a second."""
    return max(time.time() - psutil.Process().create_time(), 0.0)
