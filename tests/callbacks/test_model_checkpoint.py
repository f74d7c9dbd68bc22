import json
import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import EarlyStopping, Evaluation, LambdaCallback, ModelCheckpoint, NaNGuard
from mlx_trainer.checkpoint import CheckpointError, CheckpointStore, step_of, verify
from mlx_trainer.checkpoint.manifest import run_of
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.trainer import Trainer, TrainingError
from tests.callbacks.toy import Regression, Snapshots, batches, fit, state_bytes


@pytest.fixture(autouse=True, params=[True, False], ids=["in the background", "in the loop"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds for both."""
    monkeypatch.setattr(sys.modules[__name__], "ModelCheckpoint", partial(ModelCheckpoint, background=request.param))


def steps_in(directory: Path) -> list[int]:
    """Return the steps of the checkpoints under `directory`, and fail where anything else is there."""
    there = {path.name for path in (directory / "checkpoints").iterdir()} - {".run"}
    return sorted(int(name.removeprefix("step-")) for name in there)


class FixedLosses(Callback):
    """Puts values of the test's choosing among the metrics of each evaluation."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values

    def on_evaluation_end(self, trainer: Any, module: Any, step: int, metrics: EvalMetrics) -> None:
        """Add them."""
        metrics.metrics["fixed"] = self.values[step]


def test_the_newest_stay_and_the_last_step_is_saved(tmp_path: Path) -> None:
    """every=2 saves steps 2, 4, … and keep_last=2 leaves the two newest, of which the last is the end of the run."""
    fit([ModelCheckpoint(tmp_path, every=2, keep_last=2)], batches(7))
    assert steps_in(tmp_path) == [6, 7]


def test_without_a_limit_all_stay_and_the_last_step_can_be_left_out(tmp_path: Path) -> None:
    """keep_last=None removes none, save_at_end=False adds none after the last step."""
    fit([ModelCheckpoint(tmp_path, every=2, keep_last=None, save_at_end=False)], batches(7))
    assert steps_in(tmp_path) == [2, 4, 6]


def test_without_every_only_the_end_is_saved(tmp_path: Path) -> None:
    """every=None saves after the last step alone, here one that a stop request chose."""
    stop = LambdaCallback(every=3, on_step_end=lambda trainer, module, step: trainer.request_stop("enough"))
    fit([ModelCheckpoint(tmp_path, every=None), stop], max_epochs=2)
    assert steps_in(tmp_path) == [3]


def test_each_checkpoint_is_told_once(tmp_path: Path) -> None:
    """on_checkpoint_saved names every complete checkpoint, the last one too, and none twice."""
    saved: list[str] = []
    note = LambdaCallback(on_checkpoint_saved=lambda trainer, module, path: saved.append(path.name))
    fit([ModelCheckpoint(tmp_path, every=3), note], batches(6))
    assert saved == ["step-00000003", "step-00000006"]


def test_the_run_folder_is_where_they_go_unless_told_otherwise(tmp_path: Path) -> None:
    """Without a directory of its own it writes into the trainer's run_dir."""
    fit([ModelCheckpoint()], run_dir=tmp_path)
    assert steps_in(tmp_path) == [6]


def test_without_any_folder_it_is_refused() -> None:
    """No directory and no run_dir is an error that says what to give."""
    with pytest.raises(ValueError, match=r"ModelCheckpoint does not know where to write: .* run_dir"):
        fit([ModelCheckpoint()])


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("min", {2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0}, 4),
        ("max", {2: 3.0, 4: 1.0, 6: 3.0, 8: 2.0}, 2),
        ("min", {2: float("nan"), 4: 5.0, 6: float("-inf"), 8: float("nan")}, 4),
    ],
)
def test_the_best_one_stays(tmp_path: Path, mode: str, values: dict[int, float], best: int) -> None:
    """Of equal ones it is the earlier, never NaN or infinity; retention does not remove it."""
    checkpoint = ModelCheckpoint(tmp_path, every=2, keep_last=1, monitor="val/fixed", mode=mode)
    fit([FixedLosses(values), Evaluation(every=2), checkpoint], batches(8), batches(2, seed=1))
    assert steps_in(tmp_path) == [best, 8]
    assert checkpoint.best_checkpoint == tmp_path / "checkpoints" / f"step-{best:08d}"


def test_a_better_evaluation_is_saved_between_the_regular_ones(tmp_path: Path) -> None:
    """The best parameters are those of the evaluated step itself, not those of the next regular checkpoint."""
    checkpoint = ModelCheckpoint(tmp_path, every=5, keep_last=1, monitor="val/fixed")
    fit([FixedLosses({2: 2.0, 4: 1.0, 6: 3.0}), Evaluation(every=2), checkpoint], validation=batches(2, seed=1))
    assert steps_in(tmp_path) == [4, 6]
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["callbacks"]["ModelCheckpoint"] == {"monitor": "val/fixed", "best": {"step": 4, "value": 1.0}}


def test_the_untrained_model_is_not_saved(tmp_path: Path) -> None:
    """An evaluation before step 1 makes no checkpoint, however good it is."""
    checkpoint = ModelCheckpoint(tmp_path, every=None, monitor="val/fixed")
    fit([FixedLosses({0: 0.0, 6: 1.0}), Evaluation(at_start=True), checkpoint], validation=batches(2, seed=1))
    assert (steps_in(tmp_path), checkpoint.best and checkpoint.best.step) == ([6], 6)


def test_an_unknown_metric_is_told_with_those_that_exist(tmp_path: Path) -> None:
    """A monitor that no evaluation measures ends the run at the first one."""
    with pytest.raises(TrainingError, match=r"monitors 'val/los', .*; there are val/loss, val/perplexity"):
        fit([Evaluation(every=2), ModelCheckpoint(tmp_path, monitor="val/los")], validation=batches(2, seed=1))


def test_a_stop_after_the_last_evaluation_of_an_epoch_is_saved(tmp_path: Path) -> None:
    """Where an evaluation between two epochs ends the run, that step is saved, once."""
    stopping = EarlyStopping("val/fixed", patience=1)
    fit(
        [FixedLosses({6: 1.0, 12: 2.0}), Evaluation(), stopping, ModelCheckpoint(tmp_path, every=None)],
        validation=batches(2, seed=1),
        max_epochs=5,
    )
    assert steps_in(tmp_path) == [12]


def test_a_resumed_run_knows_what_was_best(tmp_path: Path) -> None:
    """The best one of the first part is kept in the second, which is never as good."""
    values = {step: 1.0 if step == 2 else float(step) for step in range(1, 20)}
    for max_epochs in (1, 2):
        checkpoint = ModelCheckpoint(tmp_path, every=6, keep_last=1, monitor="val/fixed")
        fit(
            [FixedLosses(values), Evaluation(every=2), checkpoint],
            validation=batches(2, seed=1),
            max_epochs=max_epochs,
            resume="auto",
        )
    assert steps_in(tmp_path) == [2, 12]


def test_the_best_of_one_metric_is_no_measure_for_another() -> None:
    """A run that goes on with another monitor starts a new best."""
    state = {"monitor": "val/loss", "best": {"step": 4, "value": 1.0}}
    same, other = ModelCheckpoint(monitor="val/loss"), ModelCheckpoint(monitor="val/accuracy", mode="max")
    same.load_state_dict(state)
    other.load_state_dict(state)
    assert (same.state_dict(), other.state_dict()) == (state, {})


def test_a_best_one_in_another_folder_is_not_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Resuming into a new folder starts a new best, with a warning, since the old one cannot be kept there."""
    values = {step: float(step) for step in range(20)}
    first = ModelCheckpoint(tmp_path / "a", every=6, monitor="val/fixed")
    fit([FixedLosses(values), Evaluation(every=3), first], validation=batches(2, seed=1))
    second = ModelCheckpoint(tmp_path / "b", every=6, monitor="val/fixed")
    with caplog.at_level(logging.WARNING):
        fit(
            [FixedLosses(values), Evaluation(every=3), second],
            validation=batches(2, seed=1),
            max_epochs=2,
            resume=tmp_path / "a" / "checkpoints" / "step-00000006",
        )
    told = [record.getMessage() for record in caplog.records if "callbacks" in record.name]
    assert told == [f"the best checkpoint so far, of step 3, is not in {tmp_path / 'b' / 'checkpoints'}"]
    assert second.best is not None
    assert second.best.step == 9


def test_a_run_cut_in_two_ends_as_the_whole_one(tmp_path: Path) -> None:
    """With dropout, AdamW and resume="auto" it has the unbroken run's parameters and optimizer state, bit for bit."""

    def run(directory: Path, stop_at: int | None) -> dict[str, bytes]:
        trainer = Trainer(
            max_epochs=3,
            max_steps=stop_at,
            callbacks=[NaNGuard(), ModelCheckpoint(directory, every=4)],
            resume="auto",
        )
        module = Regression()
        trainer.fit(module, batches())
        return state_bytes(trainer, module)

    whole = run(tmp_path / "whole", None)
    first = run(tmp_path / "cut", 8)
    assert first != whole
    assert run(tmp_path / "cut", None) == whole


def test_dropout_makes_that_test_meaningful() -> None:
    """Another random state after the same data ends with other parameters."""
    seen = [Snapshots(), Snapshots()]
    fit([seen[0]], seed=1)
    fit([seen[1]], seed=2)
    assert seen[0].after[6] != seen[1].after[6]


def test_the_result_replaces_an_older_one_whole(tmp_path: Path) -> None:
    """The finished module stands in its own folder, without a trace of the former result or of the writing."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.txt").write_text("of an older run")
    trainer, _ = fit([ModelCheckpoint(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["weights.safetensors"]
    saved = mx.load(str(tmp_path / "model" / "weights.safetensors"))
    assert isinstance(saved, dict)
    assert np.array_equal(saved["layers.0.weight"], trainer.module.model.layers[0].weight)


def test_a_failed_run_leaves_no_result(tmp_path: Path) -> None:
    """A run that ends in an error keeps its checkpoints and writes no result."""
    with pytest.raises(TrainingError):
        fit([NaNGuard(patience=1), ModelCheckpoint(tmp_path, every=1)], batches(nan_at=2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """The error names the folder, and the module was not set up."""
    (tmp_path / "file").write_text("")
    module = Regression()
    with pytest.raises(OSError, match="cannot write into this folder") as caught:
        Trainer(callbacks=[ModelCheckpoint(tmp_path / "file" / "run")]).fit(module, batches())
    assert caught.value.filename == str(tmp_path / "file" / "run" / "checkpoints")
    assert not hasattr(module, "model")


def manifest_runs(directory: Path) -> dict[int, str | None]:
    """The run of each checkpoint, by step."""
    return {step_of(path): run_of(path) for path in sorted((directory / "checkpoints").glob("step-*"))}


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """Started again with "auto", or with a path into another folder, it keeps its id; a new run has another."""
    for max_epochs in (1, 2):
        fit([ModelCheckpoint(tmp_path / "a", every=6, keep_last=None)], max_epochs=max_epochs, resume="auto")
    (run,) = set(manifest_runs(tmp_path / "a").values())
    newest = tmp_path / "a" / "checkpoints" / "step-00000012"
    fit([ModelCheckpoint(tmp_path / "b", every=6)], max_epochs=3, resume=newest)
    fit([ModelCheckpoint(tmp_path / "c", every=6)])
    assert manifest_runs(tmp_path / "b") == {18: run}
    assert run is not None
    assert len(run) == 32
    assert manifest_runs(tmp_path / "c") != {6: run}


def test_what_another_run_left_is_neither_used_nor_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new run in its folder starts at step 0, says so once, and keeps its own newest ones; "auto" continues it."""
    fit([ModelCheckpoint(tmp_path, every=6)], max_epochs=3)
    theirs = manifest_runs(tmp_path)
    with caplog.at_level(logging.WARNING):
        fit([ModelCheckpoint(tmp_path, every=2, keep_last=1)], batches(5))
    newest = tmp_path / "checkpoints" / "step-00000018"
    (told,) = [record.getMessage() for record in caplog.records if "store" in record.name]
    assert told == (
        f"{tmp_path / 'checkpoints'} has 3 checkpoints of another run, which stay as they are; "
        f"resume='{newest}' goes on with the newest"
    )
    assert list(manifest_runs(tmp_path)) == [5, *theirs]
    trainer, _ = fit([ModelCheckpoint(tmp_path, every=4, keep_last=1)], batches(5), max_epochs=2, resume="auto")
    assert manifest_runs(tmp_path).items() >= theirs.items()
    assert (trainer.state.step, set(manifest_runs(tmp_path)) - set(theirs)) == (10, {10})
    assert not any(record.getMessage().startswith("passing over") for record in caplog.records)


def test_a_run_that_ended_before_its_first_checkpoint_does_not_continue_another(tmp_path: Path) -> None:
    """Its folder is its own from its first step on, so that "auto" starts it anew and the other one is left."""
    fit([ModelCheckpoint(tmp_path, every=6)])
    saving = ModelCheckpoint(tmp_path, every=6, save_on_exception=False)
    with pytest.raises(TrainingError):
        fit([NaNGuard(patience=1), saving], batches(nan_at=2))
    trainer, _ = fit([ModelCheckpoint(tmp_path, every=None)], batches(4), resume="auto")
    assert (trainer.state.step, list(manifest_runs(tmp_path))) == (4, [4, 6])


def test_going_back_to_an_earlier_checkpoint_makes_another_run(tmp_path: Path) -> None:
    """What came after it stays, and is no longer what "auto" continues; until the first save it still is."""
    fit([ModelCheckpoint(tmp_path, every=2, keep_last=None)], batches(8))
    folder = tmp_path / "checkpoints"
    saving = ModelCheckpoint(tmp_path, every=3, keep_last=1)
    stopping = LambdaCallback(on_step_start=lambda trainer, module, step: {}[step])
    with pytest.raises(KeyError):
        fit([stopping, saving], batches(8), resume=folder / "step-00000002")
    assert CheckpointStore(folder).latest() == folder / "step-00000008"
    trainer, _ = fit([saving], batches(7), resume=folder / "step-00000002", allow_changes=("batches_per_epoch",))
    assert trainer.state.step == 7
    assert CheckpointStore(folder).latest() == folder / "step-00000007"
    assert list(manifest_runs(tmp_path)) == [2, 4, 7, 8]
    verify(folder / "other-step-00000006")  # it stood where this run saved its own
    assert len(set(manifest_runs(tmp_path).values())) == 2


def test_checkpoints_from_before_runs_had_an_id_are_continued(tmp_path: Path) -> None:
    """They are read; what is saved from then on has an id, and they stay."""
    fit([ModelCheckpoint(tmp_path, every=6)])
    folder = tmp_path / "checkpoints"
    contents = json.loads((folder / "step-00000006" / "manifest.json").read_text())
    old = {name: contents[name] for name in ("format_version", "files")}
    (folder / "step-00000006" / "manifest.json").write_text(json.dumps(old, indent=2) + "\n")
    (folder / ".run").unlink()
    trainer, _ = fit([ModelCheckpoint(tmp_path, every=6, keep_last=1)], max_epochs=2, resume="auto")
    runs = manifest_runs(tmp_path)
    assert (trainer.state.step, list(runs), runs[6], runs[12] is None) == (12, [6, 12], None, False)


def test_a_second_run_in_a_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """It is told who has it; the first goes on, and lets go of it however it ends."""
    refused, module = [], Regression()

    def start_another(trainer: Any, _: Any, step: int) -> None:
        with pytest.raises(CheckpointError, match=rf"is being written by process {os.getpid()}; wait until") as caught:
            Trainer(callbacks=[ModelCheckpoint(tmp_path)]).fit(module, batches())
        refused.append(caught.value)
        raise KeyError("the first one fails")

    for _ in range(2):
        with pytest.raises(KeyError):
            fit([ModelCheckpoint(tmp_path), LambdaCallback(on_step_end=start_another)])
    assert len(refused) == 2
    assert not hasattr(module, "model")
    fit([ModelCheckpoint(tmp_path)])
    assert not (tmp_path / "checkpoints" / ".lock").exists()


class Breaking(Callback):
    """Puts infinity among the parameters at the end of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, trainer: Any, module: Any, step: int) -> None:
        """Break them."""
        if step == self.at:
            bias = module.model.layers[0].bias
            bias[1] = float("inf")


def test_parameters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The error names the first of them and the newest good checkpoint, which is the newest that is left."""
    with pytest.raises(CheckpointError) as caught:
        fit([Breaking(at=5), ModelCheckpoint(tmp_path, every=1, keep_last=2)])
    folder = tmp_path / "checkpoints"
    assert str(caught.value) == (
        f"{folder / 'step-00000005'} was not saved: the parameter layers.0.bias in weights.safetensors is not finite; "
        f"the newest good one is {folder / 'step-00000004'}"
    )
    assert steps_in(tmp_path) == [3, 4]
    assert not (tmp_path / "model").exists()


def test_a_result_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    """Also where no checkpoint is saved at the end."""
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=r"the parameter layers\.0\.bias in weights\.safetensors is not finite"):
        fit([Breaking(at=6), ModelCheckpoint(tmp_path, every=4, save_at_end=False)])
    assert list((tmp_path / "model").iterdir()) == []
    with pytest.raises(CheckpointError, match=r"is not finite; there is no good checkpoint yet"):
        fit([Breaking(at=1), ModelCheckpoint(tmp_path / "new", every=1)])


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """The disk has so many bytes left."""
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_the_room_that_a_run_needs_is_known_before_step_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One checkpoint beside all those that are kept, fewer where some are there already; and the result."""
    fit([ModelCheckpoint(tmp_path, every=2, keep_last=2)])
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoints" / "step-00000006").glob("*.safetensors"))
    for free, resume, number in ((0, None, 3), (0, "auto", 1), (2 * size, None, 3)):
        room(monkeypatch, free)
        steps: list[int] = []
        counting = LambdaCallback(on_step_end=lambda *arguments, steps=steps: steps.append(arguments[2]))
        told = rf"has room for {free:,} bytes; this run needs [\d,]+ for {number} checkpoints of [\d,]+ bytes and the"
        with pytest.raises(CheckpointError, match=told):
            fit([counting, ModelCheckpoint(tmp_path, every=2, keep_last=2)], max_epochs=2, resume=resume)
        assert steps == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_last": 0}, "keep_last is 0"),
        ({"every": 0}, "every is 0"),
        ({"mode": "lowest"}, "mode is 'lowest'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    """Each is refused when the callback is made."""
    with pytest.raises(ValueError, match=message):
        ModelCheckpoint(**options)


def test_before_a_run_there_is_no_store() -> None:
    """The folder may come from the trainer, so asking too early says so."""
    with pytest.raises(RuntimeError, match=r"no folder before Trainer\.fit"):
        ModelCheckpoint("runs/never").latest_checkpoint()


def test_validate_alone_saves_nothing(tmp_path: Path) -> None:
    """trainer.validate needs no folder, and no metric that only a run has."""
    trainer = Trainer(callbacks=[ModelCheckpoint(tmp_path / "run", monitor="val/score")])
    assert trainer.validate(Regression(), batches(2, seed=1)).samples == 5
    assert list(tmp_path.iterdir()) == []
