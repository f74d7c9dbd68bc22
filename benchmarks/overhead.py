"""What the Trainer costs a step over the same compiled step in a raw loop, on a tiny model.

    python benchmarks/overhead.py [--steps 2000] [--rounds 9]

The raw loop runs one step ahead too, as the Trainer does; a second raw loop waits for each step, as most scripts do.
Rounds are interleaved, each figure is the median over rounds of a round's mean; differences are taken within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_trainer import Callback, LossOutput, Trainer, TrainerModule

WARM_UP = 200


class Tiny(TrainerModule):
    """64-64-8, the shape that the frameworks' overhead was measured with."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def training_loss(self, batch: dict[str, mx.array]) -> LossOutput:
        """Squared error, summed over rows and outputs."""
        error = self.model(batch["x"]) - batch["y"]
        return LossOutput(mx.square(error).sum(), mx.array(error.size, mx.float32))

    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        """Plain gradient descent: the cheapest update, so that overhead shows most."""
        return optimizers.SGD(1e-3)


def batches(number: int) -> list[dict[str, mx.array]]:
    """So many batches of 32 rows, made before the clock starts."""
    rng = np.random.default_rng(0)
    arrays = [{"x": mx.array(rng.normal(size=(32, 64)), mx.float32), "y": mx.zeros((32, 8))} for _ in range(16)]
    mx.eval(arrays)
    return [arrays[i % 16] for i in range(number)]


def raw(steps: int, ahead: bool) -> float:
    """Mean µs a step of a loop written by hand."""
    module = Tiny()
    optimizer = module.configure_optimizer(None)
    optimizer.init(module.model.trainable_parameters())
    state: list[Any] = [module.model.state, optimizer.state]

    def update(batch: dict[str, mx.array]) -> mx.array:
        def mean_loss(_: nn.Module) -> mx.array:
            output = module.training_loss(batch)
            return output.total / output.weight

        loss, gradients = nn.value_and_grad(module.model, mean_loss)(module.model)
        optimizer.update(module.model, gradients)
        return loss

    step, previous = mx.compile(update, inputs=state, outputs=state), None
    for i, batch in enumerate(batches(WARM_UP + steps)):
        if i == WARM_UP:
            start = time.perf_counter()
        loss = step(batch)
        mx.async_eval(loss, state)
        mx.eval(previous if ahead and previous is not None else loss)
        previous = loss
    mx.eval(state)
    return (time.perf_counter() - start) / steps * 1e6


class Clock(Callback):
    """Looks at the clock when the warm-up is over; costs the timed steps nothing."""

    every = WARM_UP
    start = 0.0

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Start."""
        if step == WARM_UP:
            self.start = time.perf_counter()


class Idle(Callback):
    """Hears two events a step and does nothing."""

    def __init__(self, number: int) -> None:
        self.name = f"idle {number}"

    def on_step_start(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Nothing."""

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Nothing."""


def trained(steps: int, idle: int) -> float:
    """Mean µs a step of `Trainer.fit`."""
    clock, module = Clock(), Tiny()
    callbacks = [clock, *(Idle(i) for i in range(idle))]
    Trainer(log_every=10**9, callbacks=callbacks).fit(module, batches(WARM_UP + steps))
    mx.eval(module.model.parameters())
    return (time.perf_counter() - clock.start) / steps * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    loops: dict[str, Callable[[], float]] = {
        "raw loop, waiting for each step": lambda: raw(arguments.steps, ahead=False),
        "raw loop, one step ahead": lambda: raw(arguments.steps, ahead=True),
        "Trainer": lambda: trained(arguments.steps, idle=0),
        "Trainer, 8 idle callbacks": lambda: trained(arguments.steps, idle=8),
    }
    rounds = [{name: loop() for name, loop in loops.items()} for _ in range(arguments.rounds)]
    base = "raw loop, one step ahead"
    print(f"{'µs a step':40} {'median':>8} {'over raw':>9}   (of {arguments.rounds} rounds)")
    for name in loops:
        median = statistics.median(each[name] for each in rounds)
        over = statistics.median(each[name] - each[base] for each in rounds)
        print(f"{name:40} {median:8.1f} {over:+9.1f}")


if __name__ == "__main__":
    main()
