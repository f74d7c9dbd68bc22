import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import GradientClipping, LambdaCallback, ModelCheckpoint, NaNGuard
from mlx_trainer.checkpoint import MANIFEST, seal
from mlx_trainer.interval import StepRecord
from mlx_trainer.module import LossOutput
from mlx_trainer.trainer import Trainer, TrainingError
from tests.callbacks.toy import Regression, Rows, Snapshots, ToyBatch, batches, fit


def test_a_nan_batch_in_the_middle_leaves_everything_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Parameters and optimizer state are bit-identical around it, the next step trains, the warning names its rows."""
    seen = Snapshots()
    with caplog.at_level(logging.WARNING):
        _, result = fit([GradientClipping(), NaNGuard(), seen], batches(nan_at=3))
    assert seen.after[4] == seen.after[3]
    assert seen.after[5] != seen.after[4]
    assert seen.after[3] != seen.after[2]
    assert caplog.messages == [
        "loss or gradient was not finite, so no update was made: step 4 (toy.jsonl:30, toy.jsonl:31)"
    ]
    assert result.metrics["train/skipped_steps"] == 1.0


def test_without_the_guard_the_same_batch_ruins_the_parameters() -> None:
    """The test above can fail: unguarded, the NaN gets into the weights."""
    trainer, _ = fit([], batches(nan_at=3))
    assert math.isnan(trainer.module.model.layers[0].weight[0, 0].item())


def test_a_micro_batch_of_a_window_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    """With accumulation the whole step is skipped, and the rows of all its micro-batches are named."""
    seen = Snapshots()
    with caplog.at_level(logging.WARNING):
        fit([NaNGuard(), seen], batches(nan_at=3), accumulate=2)
    assert seen.after[2] == seen.after[1]
    assert seen.after[3] != seen.after[2]
    assert caplog.messages[0].endswith(
        "step 2 (toy.jsonl:20, toy.jsonl:21, toy.jsonl:22, toy.jsonl:23, toy.jsonl:30, toy.jsonl:31)"
    )


def test_the_logged_loss_is_not_rewritten() -> None:
    """The mean over an interval with a NaN step is NaN, and the total of skipped steps stands beside it."""
    logged: dict[int, dict[str, float]] = {}
    note = LambdaCallback(on_log=lambda trainer, module, step, metrics: logged.update({step: dict(metrics)}))
    fit([NaNGuard(), note], batches(nan_at=3))
    assert [math.isnan(logged[step]["train/loss"]) for step in (2, 4, 6)] == [False, True, False]
    assert [logged[step]["train/skipped_steps"] for step in (2, 4, 6)] == [0.0, 1.0, 1.0]


def test_patience_is_counted_across_log_points() -> None:
    """Three bad steps in a row end the run though no log interval has more than one; the last one's rows are named."""
    with pytest.raises(TrainingError, match=r"3 steps in a row .* step 3 \(toy.jsonl:0, toy.jsonl:1\)"):
        fit([NaNGuard(patience=3)], batches(1, nan_at=0), log_every=1, max_epochs=5)


def test_good_steps_between_bad_ones_keep_the_run_going() -> None:
    """Three bad steps that are not in a row end nothing."""
    _, result = fit([NaNGuard(patience=2)], batches(3, nan_at=1), max_epochs=3)
    assert (result.steps, result.metrics["train/skipped_steps"]) == (9, 3.0)


def test_counts_survive_a_resume() -> None:
    """A restored guard goes on from the counts it had."""
    guard = NaNGuard(patience=3)
    guard.load_state_dict({"skipped": 4, "in_a_row": 2})
    trainer = Trainer()
    trainer.recent_steps = (StepRecord(9, math.nan, [None, Rows(("a:1",))], ["NaNGuard"]),)
    with pytest.raises(TrainingError, match=r"3 steps in a row .* step 9 \(a:1\)"):
        guard.on_log(trainer, Regression(), 9, {})
    assert guard.state_dict() == {"skipped": 5, "in_a_row": 3}


def bad(step: int, metadata: list[Any]) -> StepRecord:
    """A step that the guard refused."""
    return StepRecord(step, math.nan, metadata, ["NaNGuard"])


def test_metadata_of_another_kind_is_shown_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Without `rows`, the metadata itself says where a batch came from; without metadata the step alone does."""
    trainer = Trainer()
    trainer.recent_steps = (bad(1, ["shard 3"]), bad(2, [None]))
    NaNGuard().on_log(trainer, Regression(), 2, {})
    assert caplog.messages == ["loss or gradient was not finite, so no update was made: step 1 (shard 3), step 2"]


def test_a_second_fit_counts_from_zero() -> None:
    """Counts belong to a run, not to the object."""
    guard = NaNGuard()
    callbacks: list[Callback] = [guard]
    fit(callbacks, batches(nan_at=3))
    fit(callbacks, batches())
    assert guard.state_dict() == {"skipped": 0, "in_a_row": 0}


def test_patience_below_one_is_refused() -> None:
    """A patience of 0 would end every run."""
    with pytest.raises(ValueError, match="patience is 0"):
        NaNGuard(patience=0)


class Positions(Callback):
    """Writes down where each step stands."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_step_end(self, trainer: Trainer, module: Any, step: int) -> None:
        """Step, and micro-batches of the epoch used."""
        self.seen.append((step, trainer.state.position))


def poisoned(*places: int) -> list[ToyBatch]:
    """Twelve batches, a NaN in each of those places, counted from 0."""
    made = batches(12)
    for place in places:
        made[place].y[0] = np.nan
    return made


def test_with_rollback_the_run_goes_on_after_the_bad_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three bad steps in a row: what was saved at step 4 is back after step 8, to the bit, and trained on from there.

    The bad steps 6 to 8 change nothing, so going back takes step 5 away; step and position go on.
    """
    seen, where = Snapshots(), Positions()
    callbacks = [NaNGuard(rollback=True), seen, where, ModelCheckpoint(tmp_path, every=4, background=False)]
    with caplog.at_level(logging.WARNING):
        _, result = fit(callbacks, poisoned(5, 6, 7), log_every=1)

    assert "go back from step 8 to step 4" in caplog.text  # read at once, as a checkpoint is due: it comes after
    assert where.seen == [(n, n) for n in range(1, 13)]
    assert (result.steps, result.metrics["train/skipped_steps"]) == (12, 3.0)

    # The steps after it are those of a run from that checkpoint on the rows that came after the bad ones.
    again = Snapshots()
    for path in (tmp_path / "checkpoints").iterdir():
        if path.name > "step-00000004":
            shutil.rmtree(path)
    state = tmp_path / "checkpoints" / "step-00000004" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"step": 8, "position": 8}))
    (state.parent / MANIFEST).unlink()
    seal(state.parent)
    fit([NaNGuard(rollback=True), again], poisoned(5, 6, 7), log_every=1, resume=state.parent)
    assert again.after[12] == seen.after[12]


def test_a_rollback_compiles_nothing_anew(tmp_path: Path) -> None:
    """Values are put into the containers that the compiled step has: the loss is traced as often as without one."""

    class Counting(Regression):
        traces = 0

        def training_loss(self, batch: Any) -> LossOutput:
            self.traces += 1
            return super().training_loss(batch)

    traces = []
    for places in ((), (5, 6, 7)):
        module = Counting()
        callbacks = [NaNGuard(rollback=True), ModelCheckpoint(tmp_path / str(places), every=4)]
        trainer = Trainer(log_every=1, callbacks=callbacks)
        trainer.fit(module, poisoned(*places))
        traces.append((module.traces, trainer.rollbacks.last_step > 0))
    assert traces == [(3, False), (3, True)]


def test_rollbacks_without_a_good_log_in_between_end_the_run(tmp_path: Path) -> None:
    """Twice is allowed here, the third time is an error; a good log begins the count anew."""
    callbacks: list[Callback] = [NaNGuard(patience=1, rollback=True), ModelCheckpoint(tmp_path, every=1)]
    with pytest.raises(TrainingError, match="again after going back 2 times without a good log in between"):
        fit(callbacks, poisoned(*range(2, 12)), log_every=1, max_rollbacks=2)
    trainer, result = fit(callbacks, poisoned(2, 5, 8), log_every=1, max_rollbacks=1)
    assert (result.steps, trainer.rollbacks.in_a_row) == (12, 0)


def test_max_rollbacks_below_one_is_refused() -> None:
    """By name."""
    with pytest.raises(ValueError, match="max_rollbacks is 0; it must be 1 or more"):
        Trainer(max_rollbacks=0)


def test_weights_that_are_not_finite_are_refused_before_step_1() -> None:
    """The tensor is named; the data is not to blame."""
    module = Regression()
    module.setup("fit")
    module.model.layers[3].weight = module.model.layers[3].weight * mx.inf
    steps = Positions()
    with pytest.raises(TrainingError, match=r"the model holds NaN or infinity in layers.3.weight"):
        Trainer(callbacks=[steps]).fit(module, batches())
    assert steps.seen == []
