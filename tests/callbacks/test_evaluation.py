import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer.callbacks import Evaluation, LambdaCallback, ModelCheckpoint
from mlx_trainer.trainer import Trainer, TrainingError
from tests.callbacks.toy import Regression, batches, fit

VALIDATION = batches(2, seed=1)


def evaluated_steps(evaluation: Evaluation, **options: Any) -> list[int]:
    """Train with it and return the steps that were evaluated."""
    steps: list[int] = []
    note = LambdaCallback(on_evaluation_end=lambda trainer, module, step, metrics: steps.append(step))
    fit([evaluation, note], validation=VALIDATION, **options)
    return steps


@pytest.mark.parametrize(
    ("evaluation", "steps"),
    [
        (Evaluation(), [6, 12]),
        (Evaluation(every=5), [5, 10, 12]),
        (Evaluation(every=4), [4, 8, 12]),
        (Evaluation(at_start=True), [0, 6, 12]),
        (Evaluation(every=100, at_start=True), [0, 12]),
    ],
)
def test_when_it_evaluates(evaluation: Evaluation, steps: list[int]) -> None:
    """Each epoch or every N steps, before the first if asked, and after the last step, never twice at one step."""
    assert evaluated_steps(evaluation, max_epochs=2) == steps


def test_a_run_that_is_stopped_is_evaluated_at_its_end() -> None:
    """A stop in the middle of an epoch is a last step, too."""
    assert evaluated_steps(Evaluation(), max_steps=4) == [4]


def test_a_resumed_run_is_not_evaluated_at_its_start(tmp_path: Path) -> None:
    """at_start means the untrained model."""
    fit([ModelCheckpoint(tmp_path)])
    resumed = tmp_path / "checkpoints" / "step-00000006"
    assert evaluated_steps(Evaluation(at_start=True), max_epochs=2, resume=resumed) == [12]


def test_a_run_without_held_out_rows_is_refused_at_its_start() -> None:
    """The error comes before the first step and says what to do."""
    started: list[int] = []
    note = LambdaCallback(on_step_start=lambda trainer, module, step: started.append(step))
    with pytest.raises(TrainingError, match="Evaluation has no rows to evaluate on: pass a validation loader"):
        fit([Evaluation(), note])
    assert started == []


def absolute_error(module: Any, batch: Any) -> tuple[mx.array, mx.array]:
    """Return the sum of absolute errors and their number."""
    return mx.abs(module.model(mx.array(batch.x))[:, 0] - mx.array(batch.y)).sum(), mx.array(batch.y.size)


def test_further_metrics_are_measured() -> None:
    """A function given as a metric is reported under val/, in fit and in trainer.validate."""
    trainer, result = fit([Evaluation(metrics={"mae": absolute_error})], validation=VALIDATION)
    module = trainer.module
    module.model.eval()
    expected = [absolute_error(module, batch) for batch in VALIDATION]
    mean = sum(total.item() for total, _ in expected) / sum(weight.item() for _, weight in expected)
    assert result.evaluation.as_dict()["val/mae"] == pytest.approx(mean, rel=1e-6)
    again = Trainer(callbacks=[Evaluation(metrics={"mae": absolute_error})]).validate(module, VALIDATION)
    assert again.metrics == result.evaluation.metrics


def test_values_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """One line at level DEBUG per evaluation, with the step and each value."""
    with caplog.at_level(logging.DEBUG, logger="mlx_trainer.callbacks"):
        _, result = fit([Evaluation()], validation=VALIDATION)
    loss, perplexity = result.evaluation.loss, result.evaluation.perplexity
    assert caplog.messages[0].startswith(f"step 6: val/loss {loss:.4g}  val/perplexity {perplexity:.4g}  (5 rows in ")


def test_every_below_one_is_refused() -> None:
    """The error names the callback and the value."""
    with pytest.raises(ValueError, match="Evaluation: every is 0"):
        Evaluation(every=0)


def test_validate_works_without_a_fit() -> None:
    """The callback has nothing to do there and does not object."""
    assert Trainer(callbacks=[Evaluation()]).validate(Regression(), VALIDATION).samples == 5
