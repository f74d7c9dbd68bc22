"""What a measurement tells: plain figures, each computed from clock readings and counts alone."""

from collections.abc import Mapping, Sequence

import numpy as np
from attrs import evolve, frozen

from mlx_trainer.benchmarking.clock import StepClock


@frozen
class Speed:
    """What was done in the measured `steps`, a second; `positions` are tokens and padding."""

    steps: int
    seconds: float
    tokens_per_s: float
    trained_tokens_per_s: float
    positions_per_s: float
    rows_per_s: float
    padding_share: float


@frozen
class StepMs:
    """How long a measured step takes, in ms."""

    mean: float
    p5: float
    p50: float
    p95: float


@frozen
class HostMs:
    """Where the host is during a measured step, in ms; the three are the whole step.

    Making batches; handing the step to the device (Python and MLX, on this thread); waiting for the device.
    """

    data: float
    dispatch: float
    waiting: float


@frozen
class Shapes:
    """Distinct shapes of micro-batches: in an epoch, compiled so far, and of these in the measured steps.

    `first_dispatch_s` is what dispatching them for the first time took in all, tracing and compiling included, and
    `later_dispatch_s` what as many dispatches take once the shapes are known.
    """

    planned: int
    compiled: int
    while_measuring: int
    first_dispatch_s: float
    later_dispatch_s: float

    @property
    def all_seen(self) -> bool:
        """Whether there was a batch of every shape, the largest included."""
        return self.compiled >= self.planned


@frozen
class Epoch:
    """The first epoch, from the first clock reading of the training on; `estimated` where the run ended before it."""

    steps: int
    first_s: float
    estimated: bool
    usual_s: float


def speed(steps: int, seconds: float, counts: Mapping[str, int]) -> Speed:
    """The speed of `steps` steps that used `counts`."""
    tokens, positions = counts.get("tokens", 0), counts.get("positions", 0)
    computed = tokens - counts.get("shared_tokens", 0)
    return Speed(
        steps=steps,
        seconds=seconds,
        tokens_per_s=tokens / seconds,
        trained_tokens_per_s=counts.get("trained_tokens", 0) / seconds,
        positions_per_s=positions / seconds,
        rows_per_s=counts.get("rows", 0) / seconds,
        padding_share=1 - computed / positions if positions else 0.0,
    )


def step_ms(begin: float, done: Sequence[float]) -> StepMs:
    """The times between the ends of steps that follow each other, the first of which began at `begin`."""
    times = 1000 * np.diff([begin, *done])
    p5, p50, p95 = np.percentile(times, [5, 50, 95]).tolist()
    return StepMs(float(times.mean()), p5, p50, p95)


def epoch(begin: float, done: Sequence[float], steps: int, usual_step_s: float) -> Epoch:
    """The first epoch, of `steps` steps, where the steps that were taken from `begin` on ended at `done`."""
    taken = min(len(done), steps)
    first = done[taken - 1] - begin + (steps - taken) * usual_step_s
    return Epoch(steps, first, taken < steps, steps * usual_step_s)


def measured_speed(clock: StepClock) -> Speed:
    """The speed of the measured steps."""
    used = {name: count - clock.warm.counts.get(name, 0) for name, count in clock.end.counts.items()}
    return speed(clock.end.steps - clock.warm.steps, clock.end.time - clock.warm.time, used)


def measured_step_ms(clock: StepClock) -> StepMs:
    """The mean of the measured steps, and percentiles of those between the first and the last of them.

    A step's end is known after the next one was dispatched: the first one waits for two dispatches, the last for none.
    """
    done = clock.done[clock.warm.steps : clock.end.steps]
    every = step_ms(clock.warm.time, done)
    return every if len(done) < 3 else evolve(step_ms(done[0], done[1:-1]), mean=every.mean)


def measured_host_ms(clock: StepClock) -> HostMs:
    """Where the host was in the measured steps."""
    steps = clock.steps[clock.warm.steps : clock.end.steps]
    data, dispatch = sum(step.data for step in steps), sum(step.host for step in steps)
    waiting = clock.end.time - clock.warm.time - data - dispatch
    data_ms, dispatch_ms, waiting_ms = (1000 * seconds / len(steps) for seconds in (data, dispatch, waiting))
    return HostMs(data_ms, dispatch_ms, max(waiting_ms, 0.0))


def compiled_shapes(clock: StepClock) -> Shapes:
    """The shapes of the whole run, warm-up included."""
    measured = clock.steps[clock.warm.steps : clock.end.steps]
    first = [step.dispatch for step in clock.steps if step.new_shapes]
    known = [step.dispatch for step in measured if not step.new_shapes]
    usual = sum(known) / len(known) if known else 0.0
    return Shapes(
        planned=clock.shapes,
        compiled=clock.end.shapes,
        while_measuring=clock.end.shapes - clock.warm.shapes,
        first_dispatch_s=sum(first),
        later_dispatch_s=len(first) * usual,
    )


def first_epoch(clock: StepClock, steps: int) -> Epoch:
    """The first epoch of the run."""
    mean = (clock.end.time - clock.warm.time) / (clock.end.steps - clock.warm.steps)
    return epoch(clock.begun, clock.done, steps, mean)
