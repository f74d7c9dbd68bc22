import logging
import math
import statistics
from pathlib import Path
from typing import Any, cast

import attrs
import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.callbacks import LambdaCallback, LossSpike, ModelCheckpoint, NaNGuard
from mlx_trainer.callbacks.loss_spike import Policy
from mlx_trainer.step import StepContext
from mlx_trainer.trainer import TrainingError
from tests.callbacks.toy import Snapshots, ToyBatch, batches, fit

STEPS = 12


def with_spike(at: int, factor: float = 1000.0) -> list[ToyBatch]:
    """Twelve batches, the targets of batch `at`, counted from 0, a thousand times as large."""
    made = batches(STEPS)
    made[at] = attrs.evolve(made[at], y=made[at].y * np.float32(factor))
    return made


def spikes(losses: list[float], **options: Any) -> list[int]:
    """Feed a guard these losses one by one, as the step does; the places of those that it refuses."""
    guard, refused = LossSpike("skip", **options), []
    guard.arrays = guard.initial_arrays(cast(Any, None))
    for place, loss in enumerate(losses):
        context = StepContext(mx.array(loss), mx.array(1.0), {})
        if guard.accept_update(context.loss, {}, context).item():
            guard.arrays = guard.update_arrays(guard.arrays, {}, context)
        else:
            refused.append(place)
    return refused


def plain(losses: list[float], threshold: float, window: int) -> list[int]:
    """The same rule, written out on the host."""
    kept: list[float] = []
    refused = []
    for place, loss in enumerate(losses):
        recent = [float(np.float32(each)) for each in kept[-window:]]
        if len(recent) >= window // 2 and loss > statistics.fmean(recent) + threshold * statistics.pstdev(recent):
            refused.append(place)
        elif math.isfinite(loss):
            kept.append(loss)
    return refused


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_is_mean_and_deviation_of_the_last_accepted_losses(seed: int) -> None:
    """On 80 noisy losses with jumps and NaN, several windows long, it refuses what the written-out rule refuses."""
    random = np.random.default_rng(seed)
    losses = (5 - np.arange(80) / 40 + random.normal(size=80) / 5).tolist()
    for place in random.choice(80, 8, replace=False):
        losses[place] += random.choice([1.0, 3.0, 100.0, math.nan])
    refused = spikes(losses, threshold=3.0, window=16)
    assert refused == plain(losses, 3.0, 16)
    assert refused


def test_equal_losses_and_a_lower_one_are_none() -> None:
    """No deviation is no reason to refuse for ever, and a fall is no jump."""
    assert spikes([1 / 3] * 20 + [0.1] + [1 / 3] * 5, window=8) == []


def test_an_infinite_loss_is_left_to_nan_guard() -> None:
    """It is not a spike and does not spoil the mean."""
    assert spikes([1.0, 1.1, 0.9, 1.0, math.inf, math.nan, 1.0, 50.0], window=8) == [7]


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike_is_told_and_under_skip_not_taken(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    """The warning names step, loss and rows; parameters and optimizer state stay bit for bit only under "skip"."""
    seen = Snapshots()
    with caplog.at_level(logging.WARNING):
        _, result = fit([NaNGuard(), LossSpike(policy, window=8), seen], with_spike(8), log_every=4)
    assert (seen.after[9] == seen.after[8]) == (policy == "skip")
    assert seen.after[10] != seen.after[9]
    (message,) = caplog.messages
    assert "in step 9 (toy.jsonl:80, toy.jsonl:81, toy.jsonl:82, toy.jsonl:83)" in message
    assert message.endswith({"warn": "the update was made", "skip": "no update was made"}[policy])
    assert result.metrics["train/loss_spike"] == 0.25
    assert result.metrics["train/skipped_steps"] == 0.0  # NaNGuard counts its own


def test_the_recent_losses_are_resumed_bit_for_bit(tmp_path: Path) -> None:
    """Interrupted at step 6, the second half sees the same spike as the whole run and ends with the same arrays."""

    def run(folder: Path, **options: Any) -> tuple[Any, ...]:
        spike, seen = LossSpike("skip", window=8), Snapshots()
        fit([spike, seen, ModelCheckpoint(folder, every=6)], with_spike(8), **options)
        return seen.after.get(STEPS), {name: array.tolist() for name, array in spike.arrays.items()}

    whole = run(tmp_path / "whole", max_steps=STEPS)
    run(tmp_path / "parts", max_steps=6)
    assert run(tmp_path / "parts", max_steps=STEPS, resume="auto") == whole
    assert whole[1]["count"] == STEPS - 1


def test_another_window_begins_anew_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Arrays of another shape are not those that were saved."""
    fit([LossSpike(window=8), ModelCheckpoint(tmp_path, every=3)], max_steps=3)
    fit([LossSpike(window=16), ModelCheckpoint(tmp_path)], max_steps=6, resume="auto")
    assert "callbacks.safetensors and this run's callbacks differ in LossSpike.losses" in caplog.text


def test_rollback_goes_back_to_the_newest_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning tells of both steps; steps and rows go on."""
    seen, steps = Snapshots(), []
    note = LambdaCallback(on_step_end=lambda trainer, module, step: steps.append(step))
    callbacks = [LossSpike("rollback", window=8), seen, note, ModelCheckpoint(tmp_path, every=6, background=False)]
    with caplog.at_level(logging.WARNING):
        trainer, _ = fit(callbacks, with_spike(8), log_every=1)
    assert steps == list(range(1, STEPS + 1))
    assert "go back from step 10 to step 6" in caplog.messages[-1]  # step 10 was dispatched when step 9 was read
    assert trainer.optimizer.state["step"].item() == 6 + 2
    assert trainer.rollbacks.last_step == 10


def test_rollback_without_a_checkpoint_ends_the_run() -> None:
    """The error says why, and what to change."""
    with pytest.raises(TrainingError, match=r"jumped to .* there is no checkpoint to go back to; save more often"):
        fit([LossSpike("rollback", window=8)], with_spike(8), log_every=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"policy": "stop"}, "policy is 'stop'"), ({"threshold": 0}, "threshold is 0"), ({"window": 2}, "window 2")],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    """Each is refused when the callback is made."""
    with pytest.raises(ValueError, match=message):
        LossSpike(**options)
