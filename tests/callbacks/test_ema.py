import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import EMA, Evaluation, LambdaCallback, ModelCheckpoint, NaNGuard, model_checkpoint
from mlx_trainer.checkpoint import CheckpointError, load_tensors
from mlx_trainer.module import WEIGHTS_FILE
from mlx_trainer.snapshot import CALLBACKS_FILE
from mlx_trainer.trainer import Trainer
from tests.callbacks.toy import Regression, Snapshots, batches, fit

STEPS = 6
Arrays = dict[str, np.ndarray[Any, Any]]


class Averages(Callback):
    """What an EMA holds after each step, copied."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.after = ema, dict[int, Arrays]()

    def on_step_end(self, trainer: Trainer, module: Any, step: int) -> None:
        """Read everything; a test may."""
        self.after[step] = average_of(self.ema)


def average_of(ema: EMA) -> Arrays:
    """The average by the parameters' names."""
    return {name: np.array(value) for name, value in dict(tree_flatten(ema.arrays["average"])).items()}


def parameters(state: Mapping[str, bytes]) -> Arrays:
    """The parameters among what Snapshots has of a step."""
    named = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    return {name: np.frombuffer(value, np.float32) for name, value in named.items()}


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_its_formula_and_training_knows_nothing_of_it(warmup: bool) -> None:
    """After each of 12 steps it is what the written-out rule gives, and the run is bit for bit one without it."""
    ema, seen, plain = EMA(0.6, warmup), Snapshots(), Snapshots()
    averages = Averages(ema)
    fit([ema, averages, seen, Evaluation(every=2)], None, batches(2, seed=1), max_epochs=2)
    fit([plain], max_epochs=2)
    assert seen.after == plain.after
    expected: Arrays = {}
    for step, state in seen.after.items():
        n = step - 1
        keep = 0.0 if n == 0 else min(0.6, (1 + n) / (10 + n)) if warmup else 0.6
        for name, value in parameters(state).items():
            expected[name] = keep * expected.get(name, 0.0) + (1 - keep) * value
            assert averages.after[step][name].ravel() == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_evaluations_see_the_average() -> None:
    """The held-out loss is that of a model which has the average for parameters."""
    ema, held_out = EMA(0.9), batches(2, seed=1)
    _, result = fit([ema, Evaluation()], None, held_out)
    _, without = fit([Evaluation()], None, held_out)
    module = Regression()
    module.setup("validate")
    module.model.load_weights([(name, mx.array(value)) for name, value in average_of(ema).items()])
    expected = Trainer().validate(module, held_out)
    assert result.evaluation.loss == expected.loss != without.evaluation.loss


def test_a_refused_update_leaves_it_alone() -> None:
    """Where a loss is NaN, average and count stay as they were."""
    ema = EMA(0.9)
    averages = Averages(ema)
    fit([NaNGuard(), ema, averages], batches(nan_at=3))
    assert all(np.array_equal(averages.after[4][name], value) for name, value in averages.after[3].items())
    assert not all(np.array_equal(averages.after[5][name], value) for name, value in averages.after[3].items())
    assert ema.arrays["updates"].item() == STEPS - 1


def test_a_run_cut_in_two_has_the_average_of_one_that_was_not(tmp_path: Path) -> None:
    """Interrupted at step 3, parameters, optimizer and average end bit for bit as in one go, and so does the result."""

    def run(folder: Path, **options: Any) -> tuple[Any, ...]:
        ema, seen = EMA(0.9), Snapshots()
        fit([ema, seen, ModelCheckpoint(folder)], **options)
        return (
            seen.after.get(STEPS),
            average_of(ema),
            load_tensors(folder / "model" / WEIGHTS_FILE),
        )

    whole = run(tmp_path / "whole", max_steps=STEPS)
    run(tmp_path / "parts", max_steps=3)
    parts = run(tmp_path / "parts", max_steps=STEPS, resume="auto")
    assert parts[0] == whole[0]
    for ours, theirs in zip(parts[1:], whole[1:], strict=True):
        assert all(np.array_equal(np.array(ours[name]), np.array(value)) for name, value in theirs.items())


class Late(Callback):
    """Asks for a stop when the checkpoint of the last step was already asked for, or not, as a signal may."""

    phase = "checkpoint"

    def on_epoch_end(self, trainer: Trainer, module: Any, epoch: int) -> None:
        """Ask."""
        trainer.request_stop("a late signal")


@pytest.mark.parametrize("late", [False, True])
def test_the_result_is_the_average_and_the_checkpoint_has_both(tmp_path: Path, late: bool) -> None:
    """However late the stop is: result and module hold the average, the last checkpoint also what was trained."""
    ema, seen, modules = EMA(0.9), Snapshots(), list[Any]()
    note = LambdaCallback(on_fit_end=lambda trainer, module: modules.append(module))
    fit([ema, seen, note, ModelCheckpoint(tmp_path), *([Late()] if late else [])], max_epochs=2 if late else 1)
    average, trained = average_of(ema), parameters(seen.after[STEPS])
    newest = tmp_path / "checkpoints" / f"step-{STEPS:08}"
    held = load_tensors(tmp_path / "model" / WEIGHTS_FILE), dict(tree_flatten(modules[0].model.parameters()))
    for name, value in average.items():
        assert all(np.array_equal(np.array(each[name]), value) for each in held)
        assert np.array_equal(np.array(load_tensors(newest / WEIGHTS_FILE)[name]).ravel(), trained[name])
        assert np.array_equal(np.array(load_tensors(newest / CALLBACKS_FILE)[f"EMA.average.{name}"]), value)
    assert any(not np.array_equal(value.ravel(), trained[name]) for name, value in average.items())


def test_an_evaluation_that_fails_leaves_what_was_trained(tmp_path: Path) -> None:
    """The checkpoint that is saved on the way out holds the trained parameters, not the average that was tried."""
    seen = Snapshots()

    def fail(module: Any, batch: Any) -> Any:
        raise ValueError("no such metric")

    callbacks = [EMA(0.9), seen, Evaluation(every=4, metrics={"broken": fail}), ModelCheckpoint(tmp_path, every=None)]
    with pytest.raises(ValueError, match="no such metric"):
        fit(callbacks, None, batches(2, seed=1))
    saved, trained = load_tensors(tmp_path / "checkpoints" / "step-00000004" / WEIGHTS_FILE), parameters(seen.after[4])
    assert all(np.array_equal(np.array(saved[name]).ravel(), value) for name, value in trained.items())


def test_a_result_that_cannot_be_written_leaves_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The average was in the model to be written; the checkpoint on the way out holds the trained parameters."""

    def full(path: Path, save: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(model_checkpoint, "write_finite", full)
    seen = Snapshots()
    with pytest.raises(OSError, match="No space left"):
        fit([EMA(0.9), seen, ModelCheckpoint(tmp_path, every=None, save_at_end=False)])
    last = max(seen.after)
    saved = load_tensors(tmp_path / "checkpoints" / f"step-{last:08d}" / WEIGHTS_FILE)
    assert all(
        np.array_equal(np.array(saved[name]).ravel(), value) for name, value in parameters(seen.after[last]).items()
    )


def test_another_decay_is_another_run(tmp_path: Path) -> None:
    """The result depends on it, so a resumed run must have the same, or be allowed the change."""
    fit([EMA(0.9), ModelCheckpoint(tmp_path)], max_steps=2)
    with pytest.raises(CheckpointError, match=r"ema: \[0\.9, true\] → \[0\.5, true\]"):
        fit([EMA(0.5), ModelCheckpoint(tmp_path)], max_steps=4, resume="auto")


def test_the_average_is_float32_and_the_result_what_the_parameters_are() -> None:
    """In bfloat16 small steps would be lost from the average."""
    module, ema = Regression(), EMA(0.5)
    module.setup("fit")
    module.model.set_dtype(mx.bfloat16)
    ema.arrays = ema.initial_arrays(module)
    types = [
        {leaf.dtype for _, leaf in tree_flatten(tree)}
        for tree in (ema.arrays["average"], ema.result_parameters(module))
    ]
    assert types == [{mx.float32}, {mx.bfloat16}]


@pytest.mark.parametrize("decay", [0, 1, 1.5])
def test_a_decay_that_makes_no_average_is_refused(decay: float) -> None:
    """Such as 1, which would keep the first parameters for ever."""
    with pytest.raises(ValueError, match=f"EMA: decay is {decay}; it must be above 0 and below 1"):
        EMA(decay)
