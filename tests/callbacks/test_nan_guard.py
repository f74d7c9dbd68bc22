import logging
import math
from typing import Any

import pytest

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import GradientClipping, LambdaCallback, NaNGuard
from mlx_trainer.interval import StepRecord
from mlx_trainer.trainer import Trainer, TrainingError
from tests.callbacks.toy import Regression, Rows, Snapshots, batches, fit


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
