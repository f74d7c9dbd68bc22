import json
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import EarlyStopping, Evaluation, LambdaCallback, ModelCheckpoint
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.trainer import Trainer, TrainingError
from tests.callbacks.toy import Regression, batches, fit

VALIDATION = batches(2, seed=1)
NAN, INFINITE = float("nan"), float("inf")


def steps_until_stopped(values: list[float], **options: Any) -> tuple[int, str | None]:
    """Evaluate at each step, the metric val/score taking `values` in turn; return the last step and why it stopped."""
    scores = iter(values)

    def add_score(trainer: Any, module: Any, step: int, metrics: EvalMetrics) -> None:
        metrics.metrics["score"] = next(scores)

    callbacks = [
        LambdaCallback(on_evaluation_end=add_score),
        Evaluation(every=1),
        EarlyStopping("val/score", **options),
    ]
    trainer, result = fit(callbacks, batches(len(values)), VALIDATION)
    return result.steps, trainer.stop_reason


@pytest.mark.parametrize(
    ("values", "options", "stopped_at"),
    [
        ([5, 4, 3, 2, 1, 0], {}, 6),
        ([5, 4, 4, 4, 4, 4], {}, 5),
        ([5, 4, 4, 4, 4, 4], {"patience": 1}, 3),
        ([5, 6, 7, 4, 5, 6], {"patience": 3}, 6),
        ([5, 6, 7, 4, 5, 6, 7, 0], {"patience": 3}, 7),
        ([5, 4.95, 4.8, 4.75, 4.6, 4.0], {"min_delta": 0.1, "patience": 2}, 6),
        ([5, 4.95, 4.92, 4.9, 4.8, 4.0], {"min_delta": 0.1, "patience": 2}, 3),
        ([1, 2, 3, 4, 5, 6], {"patience": 1}, 2),
        ([1, 2, 3, 4, 5, 6], {"patience": 1, "mode": "max"}, 6),
        ([5, NAN, INFINITE, NAN, 4, 3], {}, 4),
        ([NAN, NAN, 3, 2, NAN, NAN], {}, 6),
        ([NAN, NAN, NAN, 2, 1, 0], {}, 3),
    ],
)  # fmt: skip
def test_when_it_stops(values: list[float], options: dict[str, Any], stopped_at: int) -> None:
    """After `patience` readings in a row that are not better by more than min_delta; NaN and infinity never are."""
    assert steps_until_stopped(values, **options)[0] == stopped_at


def test_the_reason_names_metric_and_values() -> None:
    """What the run says at its end is enough to understand it."""
    expected = "val/score did not improve for 2 readings (now 6.5, the best was 5)"
    assert steps_until_stopped([5, 6, 6.5, 1], patience=2) == (3, expected)


def test_the_reason_without_any_number() -> None:
    """Where only NaN was seen, there is no best to name."""
    expected = "val/score did not improve for 1 readings (now nan, no finite value was seen)"
    assert steps_until_stopped([NAN, 1], patience=1) == (1, expected)


def test_a_reading_that_is_not_finite_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Patience is not used up in silence."""
    steps_until_stopped([5, NAN, 4, 3], patience=2)
    assert caplog.messages == [
        "val/score is nan at step 2, which counts as no improvement (1 of 2 readings without improvement)"
    ]


def test_a_training_metric_is_read_at_log_points() -> None:
    """train/loss needs no evaluation; here nothing beats the first reading by a thousand."""
    _, result = fit([EarlyStopping("train/loss", patience=2, min_delta=1000.0)], log_every=1, max_epochs=3)
    assert result.stop_reason.startswith("train/loss did not improve for 2 readings")


def test_an_unknown_metric_is_told_with_those_that_exist() -> None:
    """A misspelt name is an error at the first reading, not a run that never stops."""
    with pytest.raises(TrainingError, match=r"monitors 'val/los', .*; there are val/loss, val/perplexity"):
        fit([Evaluation(every=2), EarlyStopping("val/los")], validation=VALIDATION)
    with pytest.raises(TrainingError, match=r"monitors 'train/los', .*; there are train/loss, train/lr"):
        fit([EarlyStopping("train/los")])


def test_without_an_evaluation_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that could never act is no silent one."""
    fit([EarlyStopping()])
    assert caplog.messages == ["EarlyStopping never read val/loss: no evaluation was made; add Evaluation()"]


def test_patience_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    """Two readings without improvement before the break and one after it are three."""

    class Worsening(Callback):
        def on_evaluation_end(self, trainer: Any, module: Any, step: int, metrics: EvalMetrics) -> None:
            """Add the step as a score."""
            metrics.metrics["score"] = float(step)

    def callbacks() -> list[Callback]:
        return [Worsening(), Evaluation(every=2), EarlyStopping("val/score"), ModelCheckpoint(tmp_path)]

    fit(callbacks(), validation=VALIDATION)
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["callbacks"]["EarlyStopping"] == {"best": 2.0, "without_improvement": 2}
    _, result = fit(callbacks(), validation=VALIDATION, max_epochs=4, resume="auto")
    assert result.steps == 8

    _, again = fit(callbacks(), validation=VALIDATION, max_epochs=4, resume="auto")  # it has ended: no further step
    assert (again.steps, again.stop_reason) == (8, "val/score did not improve for 3 readings")
    patient = [*callbacks()[:2], EarlyStopping("val/score", patience=4), ModelCheckpoint(tmp_path)]
    assert fit(patient, validation=VALIDATION, max_epochs=4, resume="auto")[1].steps == 10


def test_a_second_fit_begins_anew() -> None:
    """The best of an earlier run is no measure for the next."""
    stopping = EarlyStopping("val/loss", patience=1)
    stopping.best = 0.0
    trainer = Trainer(callbacks=[Evaluation(every=1), stopping])
    assert trainer.fit(Regression(), batches(), VALIDATION).steps > 1


def test_validate_alone_is_not_read() -> None:
    """trainer.validate lacks metrics that only a run has, and that is no error there."""
    trainer = Trainer(callbacks=[EarlyStopping("val/score")])
    assert trainer.validate(Regression(), VALIDATION).samples == 5
    assert trainer.stop_reason is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patience": 0}, "patience is 0"), ({"min_delta": -1.0}, "min_delta is -1.0"), ({"mode": "up"}, "mode is 'up'")],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    """Each is refused when the callback is made."""
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**options)
