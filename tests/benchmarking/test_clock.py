"""The figures, exactly: with clocks that the test winds."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer import Callback, Trainer
from mlx_trainer.benchmarking.clock import StepClock
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.figures import (
    Epoch,
    HostMs,
    Shapes,
    Speed,
    StepMs,
    compiled_shapes,
    first_epoch,
    measured_host_ms,
    measured_speed,
    measured_step_ms,
)
from mlx_trainer.benchmarking.start import Start, Stopwatch, start_of
from mlx_trainer.config import ConfigError
from tests.benchmarking.world import CountingModule, SlowBatches, SlowDevice, World
from tests.toy import toy_batches

SIZES = (4, 3, 4, 2)
"""Rows of the batches of an epoch: three shapes, new in steps 1, 2 and 4."""


def run(extent: Extent, world: World | None = None, **trainer: int) -> tuple[StepClock, Trainer]:
    """Train on SIZES until the clock has measured `extent`."""
    world = world or World()
    clock = StepClock(extent, shapes=3, now=world.now, cpu=world.cpu)
    training = Trainer(max_epochs=100, callbacks=[clock, SlowDevice(world, (1, 2, 4))], **trainer)
    training.fit(CountingModule(), SlowBatches(world, toy_batches(SIZES)))
    return clock, training


def test_every_figure_of_a_run() -> None:
    """Warm after three shapes, in step 4; then an epoch is measured, and nothing but these four steps."""
    clock, training = run(Extent(steps=4))

    # A step: 2 s for its batch (3 s for the first of the epoch), 4 s to dispatch of which 1 s is work, 4 s of waiting.
    assert measured_speed(clock) == Speed(
        steps=4,
        seconds=41.0,
        tokens_per_s=130 / 41,
        trained_tokens_per_s=78 / 41,
        positions_per_s=208 / 41,
        rows_per_s=13 / 41,
        padding_share=1 - 130 / 208,
    )
    assert measured_host_ms(clock) == HostMs(data=2250.0, dispatch=1000.0, waiting=7000.0)
    assert compiled_shapes(clock) == Shapes(
        planned=3, compiled=3, while_measuring=0, first_dispatch_s=42.0, later_dispatch_s=12.0
    )
    # A step is known to be done when the next one was dispatched: the first lasts 11 + 10 s, the last (here) no time.
    assert measured_step_ms(clock) == StepMs(mean=10250.0, p5=10000.0, p50=10000.0, p95=10000.0)
    assert first_epoch(clock, training.steps_per_epoch) == Epoch(4, 3 + 4 * 8 + 3 * 2 + 30, False, 41.0)
    assert (training.state.step, training.stop_reason) == (8, "measured enough")


def test_percentiles_of_steps_of_uneven_length() -> None:
    """They are those of the steps between the first and the last; of two steps, those of both."""
    clock, _ = run(Extent(steps=7))
    steps = measured_step_ms(clock)  # 21, then 10, 10, 11, 10, 10, then 0 s
    assert (steps.mean, steps.p5, steps.p50, steps.p95) == pytest.approx((72_000 / 7, 10_000, 10_000, 10_800))
    clock, _ = run(Extent(steps=2))
    steps = measured_step_ms(clock)
    assert (steps.mean, steps.p5, steps.p50, steps.p95) == pytest.approx((10_500, 1_050, 10_500, 19_950))


def test_the_device_is_waited_for_three_times_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first step, before the first measured one and after the last; never in between."""
    calls: list[int] = []
    evaluate = mx.eval

    def counted(*arrays: Any) -> None:
        calls.append(1)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", counted)

    def evaluations(*callbacks: Callback) -> int:
        calls.clear()
        Trainer(max_steps=7, callbacks=callbacks).fit(CountingModule(), toy_batches(SIZES))
        return len(calls)

    assert evaluations(StepClock(Extent(steps=4, warmup=3), shapes=3)) == evaluations() + 3


def test_the_start_is_split_without_a_gap() -> None:
    """The parts add up to the time since the process began."""
    world = World()
    watch = Stopwatch(world.now(), now=world.now)
    for name, seconds in (("imports", 2), ("data", 5), ("model", 3)):
        world.work(seconds)
        watch.lap(name)
    clock, _ = run(Extent(steps=1), world)
    parts = {"python": 0.5, "imports": 2, "data": 5, "model": 3, "setup": 3, "tracing": 14, "computing": 4}
    assert start_of(watch, clock, before_command_s=0.5) == Start(31.5, 31.0, parts)
    assert sum(parts.values()) == 31.5


def test_waiting_for_a_log_is_no_making_of_batches() -> None:
    """At the end of an epoch the trainer reads its log, and waits; that is the device's time."""
    world = World()

    class SlowLog(Callback):
        def on_log(self, trainer: Any, module: Any, step: int, metrics: dict[str, float]) -> None:
            world.wait(100)

    clock = StepClock(Extent(steps=4), shapes=3, now=world.now, cpu=world.cpu)
    training = Trainer(max_epochs=9, log_every=4, callbacks=[clock, SlowDevice(world, ()), SlowLog()])
    training.fit(CountingModule(), SlowBatches(world, toy_batches(SIZES)))
    assert [step.data for step in clock.steps] == [3, 2, 2, 2, 3, 2, 2, 2]


@pytest.mark.parametrize(
    ("extent", "warmup", "measured"),
    [
        (Extent(steps=2), 4, 2),  # the third shape comes in step 4
        (Extent(steps=2, warmup=1), 1, 2),
        (Extent(seconds=60), 4, 6),  # an epoch takes 41 s
        (Extent(seconds=1), 4, 3),  # at least three steps
        (Extent(steps=5, warmup=6, seconds=1), 6, 5),
    ],
)
def test_how_long_it_measures(extent: Extent, warmup: int, measured: int) -> None:
    """Steps where they are given; else time, after every shape was there."""
    clock, _ = run(extent)
    assert (clock.warm.steps, clock.end.steps - clock.warm.steps) == (warmup, measured)


def test_warming_up_ends_with_the_first_epoch() -> None:
    """More shapes than the epoch has are not waited for, and an update of two batches is half a step of the epoch."""
    world = World()
    clock = StepClock(Extent(steps=1), shapes=99, now=world.now, cpu=world.cpu)
    Trainer(max_epochs=9, accumulate=2, callbacks=[clock]).fit(CountingModule(), toy_batches(SIZES))
    assert (clock.warm.steps, clock.end.shapes) == (2, 3)


def test_shapes_that_come_late_are_told_and_an_epoch_is_estimated() -> None:
    """Measured from the second step on, the third shape is new while measuring; half the epoch is taken as usual."""
    clock, training = run(Extent(steps=1, warmup=1))
    assert compiled_shapes(clock) == Shapes(3, 2, 1, first_dispatch_s=28.0, later_dispatch_s=0.0)
    assert not compiled_shapes(clock).all_seen
    assert first_epoch(clock, training.steps_per_epoch) == Epoch(4, 41 + 2 * 20, True, 4 * 20)


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("warmup", -1)])
def test_less_than_a_step_is_refused(name: str, value: int) -> None:
    """The message names the option."""
    with pytest.raises(ConfigError, match=f"--{name} is {value}; it must be a whole number, at least 1"):
        Extent(**{name: value})
