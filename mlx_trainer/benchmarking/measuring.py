"""Trains into nowhere, as `train` would, and tells what it measured."""

import logging
import os
import time
from typing import Any

from attrs import asdict, frozen

from mlx_trainer import build
from mlx_trainer.benchmarking.ceiling import Ceiling, ceiling, matmul_rate, weights_passed
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
from mlx_trainer.benchmarking.memory import Memory, memory_of
from mlx_trainer.benchmarking.start import Start, Stopwatch, process_age_s, start_of
from mlx_trainer.callback import overrides
from mlx_trainer.config import Config
from mlx_trainer.data import DataReport
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.libraries import quiet_imports
from mlx_trainer.monitoring import environment_facts, setup_logging
from mlx_trainer.trainer import Trainer

log = logging.getLogger("mlx_trainer.benchmarking")

MOST_STEPS = 10**6
"""The end of the learning rate's schedule; a benchmark stops long before it."""


@frozen
class Setting:
    """What was trained, and how much of it a whole training would be."""

    model: str
    dtype: str
    method: str
    parameters: int
    trainable: int
    layout: str
    batch_size: int | None
    batch_tokens: int | None
    accumulate: int
    train_rows: int
    total_steps: int
    warmup_steps: int


@frozen
class Report:
    """All figures of one run; `ceiling` is None for models whose tokens take different ways."""

    environment: dict[str, Any]
    setting: Setting
    speed: Speed
    step_ms: StepMs
    host_ms: HostMs
    ceiling: Ceiling | None
    memory: Memory
    shapes: Shapes
    epoch: Epoch
    start: Start
    load_before: float
    """The machine's load average over the minute before it began: CPUs that other programs kept busy."""

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return asdict(self)


def measure(config: Config, extent: Extent, started: float | None = None) -> Report:
    """Train `config` for a while and throw the result away; nothing is written but what `train` keeps in its caches.

    `started` is when the command began, on `time.perf_counter`'s scale. Raises what `build.train` raises.
    """
    watch = Stopwatch(time.perf_counter() if started is None else started)
    before = process_age_s() - (time.perf_counter() - watch.started)
    load = os.getloadavg()[0]
    import_libraries()
    watch.lap("imports")
    with setup_logging():
        module, clock, trainer, rows = run(config, extent, watch)
    reached = measured_speed(clock)
    return Report(
        environment=environment_facts(),
        setting=setting_of(config, module, rows, clock),
        speed=reached,
        step_ms=measured_step_ms(clock),
        host_ms=measured_host_ms(clock),
        memory=memory_of(module.model, trainer.optimizer.state, adapters=config.training.method != "full"),
        ceiling=ceiling_of(config, module, reached),
        shapes=compiled_shapes(clock),
        epoch=first_epoch(clock, rows.steps_per_epoch),
        start=start_of(watch, clock, before),
        load_before=load,
    )


def run(config: Config, extent: Extent, watch: Stopwatch) -> tuple[CausalLMModule, StepClock, Trainer, DataReport]:
    """Prepare as `build.train` does, train until the clock has enough, and return what was used."""
    module = build.build_module(config)
    data = build.build_data(config, module)
    rows = build.build_report(config, data, module)
    for line in rows.epoch_lines():
        log.info("%s", line)
    watch.lap("data")
    build.prepare(config, module, data)
    watch.lap("model")
    clock = StepClock(extent, rows.shapes)
    trainer = throwaway_trainer(config, clock)
    log.info("training into nowhere: %s", extent)
    trainer.fit(module, data)
    return module, clock, trainer, rows


def import_libraries() -> None:
    """Import what a training imports when it comes to it, so that it is told apart from the work."""
    with quiet_imports():
        import transformers.models.auto.tokenization_auto  # noqa: F401


def throwaway_trainer(config: Config, clock: StepClock) -> Trainer:
    """The trainer of `config` with the callbacks that take part in its update, and the clock: none of them writes."""
    update = ("transform_gradients", "accept_update")
    asked = build.build_callbacks(config, evaluating=False)
    kept = [callback for callback in asked if any(overrides(callback, event) for event in update)]
    return Trainer(
        max_steps=MOST_STEPS + (clock.extent.warmup or 0) + (clock.extent.steps or 0),
        accumulate=config.training.gradient_accumulation_steps,
        callbacks=[*kept, clock],
        log_every=config.training.logging_steps,
        seed=config.data.seed,
    )


def setting_of(config: Config, module: CausalLMModule, rows: DataReport, clock: StepClock) -> Setting:
    """What `config` trains."""
    training, parameters = config.training, module.parameter_stats
    return Setting(
        model=config.model.model_name,
        dtype=config.model.dtype,
        method=training.method,
        parameters=parameters.total,
        trainable=parameters.trainable,
        layout=rows.layout,
        batch_size=training.batch_size if training.batch_tokens is None else None,
        batch_tokens=training.batch_tokens,
        accumulate=training.gradient_accumulation_steps,
        train_rows=rows.summary.train_rows,
        total_steps=rows.total_steps,
        warmup_steps=clock.warm.steps,
    )


def ceiling_of(config: Config, module: CausalLMModule, reached: Speed) -> Ceiling | None:
    """What the machine's matrix products allow, beside the speed that was reached."""
    weights = weights_passed(module.model)
    if weights is None:
        return None
    method = config.training.method
    known = method == "dpo" and config.preference.precompute_ref_log_probs  # then a step has no reference to compute
    return ceiling(
        matmul_rate(config.model.dtype),
        weights,
        "lora" if known else method,
        tokens_per_s=reached.tokens_per_s,
        trained_tokens_per_s=reached.trained_tokens_per_s,
        positions_per_s=reached.positions_per_s,
    )
