"""The loop: when it stops, what it reads, what it reports, and that it continues exactly."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_trainer import Callback, LambdaCallback, LossOutput, NaNGuard, Trainer, TrainerModule
from mlx_trainer.checkpoint import CheckpointError, seal
from mlx_trainer.limits import seconds_of
from mlx_trainer.state import random_state
from mlx_trainer.step import TrainStep
from mlx_trainer.traced import from_tree, to_tree
from mlx_trainer.trainer import TrainingError
from tests.toy import ToyBatch, ToyLoader, ToyModule, toy_batches, weights, with_nan

READS = (
    "item",
    "tolist",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__array__",
    "__iter__",
    "__repr__",
    "__format__",
)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts every way in which a value can get from the device to the host, and every wait."""
    counts: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    for name in READS:
        counted(mx.array, name)
    for name in ("eval", "synchronize"):
        counted(mx, name)
    return counts


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_without_logging_read_nothing_from_the_device(reads: Counter[str], accumulate: int) -> None:
    """Between log points no value is read, and the host waits once a step: for the step before the one dispatched."""
    seen: list[Counter[str]] = []

    class Snapshots(Callback):
        def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
            seen.append(reads.copy())

        def transform_gradients(self, gradients: Any, context: Any) -> Any:
            return gradients, {"grad_norm": context.grad_norm}

        def accept_update(self, loss: mx.array, gradients: Any, context: Any) -> mx.array:
            return mx.isfinite(loss)

    trainer = Trainer(max_steps=9, max_epochs=9, accumulate=accumulate, log_every=100, callbacks=[Snapshots()])
    trainer.fit(ToyModule(), toy_batches((4,) * 9))

    per_step = [dict(later - earlier) for earlier, later in itertools.pairwise(seen)]
    assert per_step == [{"eval": 1}] * 8
    assert reads["item"] > 0  # the counter does count: the last log reads


def test_the_next_step_is_dispatched_before_a_log_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a log point the device already has the next step to do."""
    order: list[str] = []

    class Order(Callback):
        def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
            order.append(f"log {step}")

    dispatch = TrainStep.__call__

    def recorded(step: TrainStep, window: Any) -> Any:
        order.append("dispatch")
        return dispatch(step, window)

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    Trainer(max_steps=3, log_every=1, callbacks=[Order()]).fit(ToyModule(), toy_batches((4, 4, 4)))

    assert order == ["dispatch", "dispatch", "log 1", "dispatch", "log 2", "log 3"]


@pytest.mark.parametrize(
    ("limits", "steps", "epochs", "reason"),
    [
        ({}, 4, 1, "max_epochs=1 reached"),
        ({"max_epochs": 2}, 8, 2, "max_epochs=2 reached"),
        ({"max_steps": 3}, 3, 0, "max_steps=3 reached"),
        ({"max_steps": 4}, 4, 1, "max_steps=4 reached"),
        ({"max_steps": 9, "max_epochs": 2}, 8, 2, "max_epochs=2 reached"),
        ({"max_time": 0}, 0, 0, "max_time=0:00:00 reached"),
        ({"fast_dev_run": True}, 1, 0, "max_steps=1 reached"),
        ({"fast_dev_run": 2, "max_steps": 50}, 2, 0, "max_steps=2 reached"),
    ],
)
def test_where_a_run_ends(limits: dict[str, Any], steps: int, epochs: int, reason: str) -> None:
    """Seven batches in windows of two are four steps an epoch, the last a short one; the first limit counts."""
    result = Trainer(accumulate=2, **limits).fit(ToyModule(), toy_batches())
    assert (result.steps, result.epochs, result.stop_reason) == (steps, epochs, reason)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(90, 90.0), (timedelta(minutes=2), 120.0), ("30", 30.0), ("01:00:00", 3600.0), ("02:00:00:05", 172805.0)],
)
def test_ways_to_give_a_time(given: Any, seconds: float) -> None:
    """Seconds, a timedelta, or DD:HH:MM:SS."""
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("name", ["max_epochs", "max_steps", "accumulate", "log_every"])
def test_numbers_below_one_are_refused_by_name(name: str) -> None:
    """A run of no steps is not what anybody means."""
    with pytest.raises(ValueError, match=f"{name} is 0; it must be 1 or more"):
        Trainer(**{name: 0})  # type: ignore[arg-type]


def test_a_time_that_is_none_is_refused() -> None:
    """The message says what would be right."""
    with pytest.raises(
        ValueError, match=re.escape("max_time is '2 hours'; give seconds, a timedelta, or \"DD:HH:MM:SS\"")
    ):
        Trainer(max_time="2 hours")


def test_the_optimizer_is_told_the_number_of_steps() -> None:
    """Schedules end where the run ends; a run limited by time only has no number."""
    told: list[int | None] = []

    class Tells(ToyModule):
        def configure_optimizer(self, total_steps: int | None) -> Any:
            told.append(total_steps)
            return super().configure_optimizer(total_steps)

    for limits in ({"max_epochs": 3}, {"max_steps": 5}, {"max_steps": 5, "max_epochs": 1}, {"max_time": 0.0}):
        Trainer(accumulate=2, **limits).fit(Tells(), toy_batches())  # type: ignore[arg-type]
    assert told == [12, 5, 4, None]


def test_logged_values_are_means_over_all_tokens_since_the_last_log() -> None:
    """The loss of three steps is Σ total / Σ weight over their rows, not a mean of three means."""
    logged: list[dict[str, float]] = []

    class Keep(Callback):
        def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
            logged.append(metrics)

    batches = toy_batches((4, 1, 3))
    module = ToyModule(dropout=0.0, learning_rate=0.0)
    Trainer(max_steps=3, log_every=3, callbacks=[Keep()]).fit(module, batches)

    outputs = [module.training_loss(from_tree(to_tree(batch))) for batch in batches]
    weight = sum(o.weight.item() for o in outputs)  # type: ignore[misc]
    (metrics,) = logged
    assert metrics["train/loss"] == pytest.approx(sum(o.total.item() for o in outputs) / weight, rel=1e-6)  # type: ignore[misc]
    assert metrics["train/absolute_error"] == pytest.approx(
        sum(o.metrics["absolute_error"].item() for o in outputs) / weight,  # type: ignore[misc]
        rel=1e-6,
    )
    assert metrics["train/lr"] == 0.0
    assert metrics["train/rows_per_second"] == pytest.approx(8 / (3 * metrics["perf/step_ms"] / 1000))


def test_overfitting_uses_the_first_batches_for_training_and_validation() -> None:
    """Two batches an epoch, and the held-out loss is theirs."""

    class Evaluates(Callback):
        def on_epoch_end(self, trainer: Trainer, module: TrainerModule, epoch: int) -> None:
            trainer.request_evaluation()

    batches = toy_batches()
    result = Trainer(max_epochs=2, overfit_batches=2, callbacks=[Evaluates()]).fit(ToyModule(), batches, batches[4:])
    assert result.steps == 4
    assert result.evaluation is not None
    assert result.evaluation.counts == {"rows": 7}


@pytest.mark.parametrize(("limit", "rows"), [(None, 24), (2, 7), (0.5, 13)])
def test_validation_can_be_limited(limit: int | float | None, rows: int) -> None:
    """To a number of batches, or to a share of them, rounded up."""
    metrics = Trainer(limit_validation_batches=limit).validate(ToyModule(), toy_batches())
    assert metrics.samples == rows


def test_predictions_come_per_batch_in_eval_mode() -> None:
    """Dropout is off, so that two passes agree, and the training mode is restored."""
    module, batches = ToyModule(dropout=0.5), toy_batches((4, 2))
    first, second = Trainer().predict(module, batches), Trainer().predict(module, batches)
    assert [p.shape for p in first] == [(4,), (2,)]
    assert [p.tolist() for p in first] == [p.tolist() for p in second]
    assert module.model.training


def test_an_evaluation_without_validation_rows_is_refused() -> None:
    """Asking for one says so instead of training on without it."""

    class Asks(Callback):
        def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
            trainer.request_evaluation()

    with pytest.raises(TrainingError, match="this run has no validation rows"):
        Trainer(max_steps=2, callbacks=[Asks()]).fit(ToyModule(), toy_batches())


@pytest.mark.parametrize(
    ("data", "message"),
    [([], "the training loader is empty"), (iter([1]), "a loader is a sized iterable of batches")],
)
def test_what_cannot_be_trained_on_is_refused(data: Any, message: str) -> None:
    """Before the model is built."""
    module = ToyModule()
    with pytest.raises((TypeError, ValueError), match=message):
        Trainer().fit(module, data)
    assert not hasattr(module, "model")


def test_a_module_must_have_a_loss() -> None:
    """The error names the class and the method."""

    class Empty(TrainerModule):
        def __init__(self) -> None:
            self.model = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=re.escape("Empty must define training_loss(batch) -> LossOutput")):
        Trainer().fit(Empty(), [mx.zeros((1, 2))])


def test_a_batch_may_be_any_tree_of_arrays() -> None:
    """A bare array, a tuple with a nested dict, NumPy or MLX; the same numbers give the same weights."""

    class Plain(ToyModule):
        def training_loss(self, batch: Any) -> LossOutput:
            x, rest = batch
            return super().training_loss(ToyBatch(x, rest["y"], rest["weight"], None))

        def count(self, batch: Any) -> dict[str, int]:
            return {}

    batches = toy_batches((4, 3))
    as_objects, as_trees = ToyModule(), Plain()
    Trainer(seed=1).fit(as_objects, batches)
    Trainer(seed=1).fit(as_trees, [(mx.array(b.x), {"y": b.y, "weight": mx.array(b.weight)}) for b in batches])
    assert weights(as_objects) == weights(as_trees)


class SaveAt(Callback):
    """Writes one checkpoint after `step` into `directory`."""

    def __init__(self, step: int, directory: Path, background: bool = False) -> None:
        self.step, self.directory, self.background, self.seen = step, directory, background, 0

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        self.seen += 1
        if step == self.step:
            trainer.request_checkpoint()

    def on_checkpoint(self, trainer: Trainer, module: TrainerModule, step: int) -> Path | None:
        if not self.background:
            return self.save(trainer.write_checkpoint)
        trainer.save_in_background(self.save)
        return None

    def save(self, write: Callable[[Path], None]) -> Path:
        self.directory.mkdir()
        write(self.directory)
        seal(self.directory)
        return self.directory

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]


def run(loader: Any, callback: Callback, **options: Any) -> tuple[Any, ...]:
    """Three epochs of four steps; what must be the same bit for bit at the end."""
    module = ToyModule()
    trainer = Trainer(max_epochs=3, accumulate=2, callbacks=[callback], **options)
    result = trainer.fit(module, loader)
    return weights(module), random_state(), result.steps, result.epochs, result.counts


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("step", range(1, 13))
def test_resuming_at_any_step_continues_bit_for_bit(step: int, background: bool, tmp_path: Path) -> None:
    """Shuffled uneven batches, dropout, accumulation, AdamW: weights, randomness and counts as if never interrupted."""
    whole = SaveAt(step, tmp_path / "checkpoint", background)
    expected = run(ToyLoader(toy_batches()), whole)
    resumed = SaveAt(0, tmp_path / "none")

    assert run(ToyLoader(toy_batches()), resumed, resume=tmp_path / "checkpoint") == expected
    assert resumed.seen == whole.seen == 12


def test_a_checkpoint_between_two_logs_loses_nothing_of_them(tmp_path: Path) -> None:
    """It is a log point: what the steps since the last one were is told, and counted, before it is saved."""
    batches = toy_batches()
    batches[0] = with_nan(batches[0])
    logs: list[tuple[int, str]] = []  # as texts: NaN is not itself

    def told(*callbacks: Callback, **options: Any) -> list[tuple[int, str]]:
        logs.clear()
        note = LambdaCallback("note", on_log=lambda t, m, step, values: logs.append((step, str(values["train/loss"]))))
        guard = NaNGuard()
        Trainer(max_steps=9, log_every=4, callbacks=[guard, note, *callbacks], **options).fit(ToyModule(), batches)
        assert guard.skipped == 2
        return list(logs)

    whole = told(SaveAt(3, tmp_path / "checkpoint"))
    assert [step for step, _ in whole] == [3, 4, 8, 9]
    assert told(resume=tmp_path / "checkpoint") == whole[1:]


def test_a_loader_without_a_position_is_fast_forwarded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain list resumes exactly too, by skipping."""
    expected = run(toy_batches(), SaveAt(6, tmp_path / "checkpoint"))

    assert run(toy_batches(), SaveAt(0, tmp_path / "none"), resume=tmp_path / "checkpoint") == expected
    assert "list has no load_state_dict, so 4 batches are drawn again to find the place" in caplog.text


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    """The tensor, its shape and the model's are in the message."""
    run(toy_batches(), SaveAt(2, tmp_path / "checkpoint"))

    class Wider(ToyModule):
        def setup(self, stage: str) -> None:
            self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Tanh(), nn.Linear(9, 1))

    with pytest.raises(CheckpointError, match=re.escape("layers.0.weight.m has shape (8, 6), the model's has (9, 6)")):
        Trainer(accumulate=2, resume=tmp_path / "checkpoint").fit(Wider(), toy_batches())


def test_an_evaluation_does_not_change_the_training(tmp_path: Path) -> None:
    """The same run with evaluations and logs at every step ends with the same weights and randomness."""

    class Evaluates(Callback):
        def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
            trainer.request_evaluation()

    results = []
    for callbacks, log_every in (([], 100), ([Evaluates()], 1)):
        module = ToyModule()
        Trainer(max_epochs=2, log_every=log_every, callbacks=callbacks).fit(module, toy_batches(), toy_batches((3, 2)))
        results.append((weights(module), random_state()))
    assert results[0] == results[1]


def test_an_empty_validation_is_an_error_and_not_a_nan() -> None:
    """No batch, no loss."""
    with pytest.raises(ValueError, match="nothing to evaluate"):
        Trainer().validate(ToyModule(), [])


def test_the_mode_of_the_model_survives_a_failing_evaluation() -> None:
    """A model left in eval mode would train on without dropout."""

    class Fails(ToyModule):
        def validation_loss(self, batch: Any) -> LossOutput:
            raise RuntimeError("no")

    module = Fails()
    with pytest.raises(RuntimeError, match="no"):
        Trainer().validate(module, toy_batches())
    assert module.model.training


def test_metrics_of_ones_own() -> None:
    """A function of module and batch, weighted as it says; beside the module's own metrics."""

    def largest(module: TrainerModule, batch: ToyBatch) -> tuple[mx.array, mx.array]:
        return mx.abs(batch.y).max(), mx.array(1.0)

    trainer, batches = Trainer(), toy_batches((4, 2))
    trainer.validation_metrics["largest"] = largest  # type: ignore[assignment]
    metrics = trainer.validate(ToyModule(), batches)

    assert metrics.metrics["largest"] == pytest.approx(sum(abs(b.y).max() for b in batches) / 2, rel=1e-6)
    assert set(metrics.as_dict()) == {"val/loss", "val/perplexity", "val/absolute_error", "val/largest"}
    assert metrics.perplexity == pytest.approx(math.exp(metrics.loss))


@pytest.fixture(autouse=True)
def _no_leftover_patches() -> Iterator[None]:
    item = mx.array.item
    yield
    assert mx.array.item is item
