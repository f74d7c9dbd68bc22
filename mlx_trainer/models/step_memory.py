"""The memory of a run's training steps: what they run again so that it suffices, told as it is chosen."""

import logging
from typing import Any, Literal

import mlx.core as mx
from attrs import Factory, define
from mlx.optimizers import Optimizer

from mlx_trainer import runtime
from mlx_trainer.models.memory import MemoryEstimate, choose, estimate
from mlx_trainer.models.recomputation import Policy

log = logging.getLogger("mlx_trainer.models")

WAIT_FROM = 0.45
"""Where so much of what a step has in flight is held, beside what it keeps, queued work waits on CUDA: what was queued
before comes to the rest."""


def step_estimate(
    model: Any, batch: Any, optimizer: Optimizer, recompute: Policy | Literal["auto"] = "auto"
) -> MemoryEstimate:
    """Return what a step of an unpadded `batch` needs; for "auto" that of the policy which runs as little as fits."""
    if recompute == "auto":
        return choose(model, batch, optimizer, runtime.memory_limit_bytes())
    return estimate(model, batch, optimizer, recompute)


@define
class StepMemory:
    """What the steps of a run need at most, in bytes, and what MLX keeps for them."""

    needed: int = 0
    """At the peak of a step."""
    _held: int = 0
    """Before the first step."""
    _added: int = 0
    """By a step, to what is held."""
    _told: set[Policy] = Factory(set)

    def begin(self) -> None:
        """Let MLX keep what it keeps where no step is known."""
        runtime.bound_memory()
        self.needed = self._held = self._added = 0

    def bound(self, step: MemoryEstimate) -> None:
        """Let MLX keep what `step`, which is to be traced, and those before it leave free.

        It is told, with the memory that is needed, at the first step and where another policy is used, or a tenth more
        memory than before.
        """
        limit = runtime.memory_limit_bytes()
        if step.policy not in self._told or step.peak > 1.1 * self.needed:
            log.info("%s", step.line(limit))
        if self.needed <= limit < step.peak:
            log.warning("More memory than there is: use smaller batches, shorter rows, or a 4-bit model.")
        self._told.add(step.policy)
        self.needed = max(self.needed, step.peak)
        self._held = self._held or mx.get_active_memory()  # before the first step, so nothing is in flight
        self._added = max(self._added, step.kept + int(WAIT_FROM * step.in_flight))
        runtime.bound_memory(self.needed, self._held + self._added)
