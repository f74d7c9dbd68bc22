"""The exact order of events."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer import Callback, Trainer, callback
from tests.toy import ToyModule, toy_batches

FIVE = toy_batches((4, 3, 4, 2, 4))


class Recorder(Callback):
    """Writes down every event; traced ones come once per compilation."""

    def __init__(self, name: str = "Recorder", events: list[Any] | None = None) -> None:
        self.name, self.events = name, [] if events is None else events
        for event in callback.HOST_EVENTS:
            setattr(self, event, self._recording(event))

    def _recording(self, event: str) -> Any:
        def record(trainer: Any, module: Any, *arguments: Any) -> None:
            shown = [a for a in arguments if isinstance(a, (int, str)) and not isinstance(a, bool)]
            self.events.append((event, *shown))
            self.react(trainer, event, *arguments)

        return record

    def react(self, trainer: Any, event: str, *arguments: Any) -> None:
        """Overridden where a test wants something to happen."""


class Asking(Recorder):
    """Asks for an evaluation and a checkpoint at step 2, and to stop in the middle of step 4."""

    def react(self, trainer: Any, event: str, *arguments: Any) -> None:
        if (event, *arguments) == ("on_step_start", 2):
            trainer.request_evaluation()
            trainer.request_checkpoint()
        if (event, *arguments) == ("on_step_start", 4):
            trainer.request_stop("seen enough")


def test_the_timeline_of_a_run() -> None:
    """Accumulation 2 over 5 batches gives 3 steps an epoch; logs come late, evaluation before checkpoint, stop last."""
    recorder = Asking()
    recorder.on_checkpoint = _recorded_checkpoint(recorder)  # type: ignore[method-assign]
    trainer = Trainer(max_epochs=3, accumulate=2, log_every=1, callbacks=[recorder])

    result = trainer.fit(ToyModule(), FIVE, FIVE[:2])

    assert recorder.events == [
        ("setup", "fit"),
        ("on_fit_start",),
        ("on_epoch_start", 0),
        ("on_step_start", 1),
        ("on_step_dispatched", 1),
        ("on_step_end", 1),
        ("on_step_start", 2),
        ("on_step_dispatched", 2),
        ("on_log", 1),  # step 2 is already dispatched
        ("on_step_end", 2),
        ("on_log", 2),  # read at once: an evaluation is due
        ("on_evaluation_start", 2),
        ("on_evaluation_end", 2),
        ("on_checkpoint", 2),
        ("on_checkpoint_saved",),
        ("on_step_start", 3),
        ("on_step_dispatched", 3),
        ("on_step_end", 3),
        ("on_log", 3),  # read at once: the epoch ends
        ("on_epoch_end", 0),
        ("on_epoch_start", 1),
        ("on_step_start", 4),
        ("on_step_dispatched", 4),
        ("on_step_end", 4),
        ("on_log", 4),
        ("on_epoch_end", 1),
        ("on_fit_end",),
        ("teardown", "fit"),
    ]
    assert (result.steps, result.epochs, result.stop_reason) == (4, 1, "seen enough")


def _recorded_checkpoint(recorder: Recorder) -> Any:
    def on_checkpoint(trainer: Any, module: Any, step: int) -> Path:
        recorder.events.append(("on_checkpoint", step))
        return Path("somewhere")

    return on_checkpoint


def test_an_exception_reaches_every_callback_and_the_caller() -> None:
    """`on_exception` and `teardown` are isolated, teardown runs in reverse, and the original error is raised."""
    events: list[Any] = []

    class First(Recorder):
        def react(self, trainer: Any, event: str, *arguments: Any) -> None:
            self.events[-1] = (self.name, *self.events[-1])
            if (event, *arguments) == ("on_step_end", 2):
                raise RuntimeError("the original error")
            if event in ("on_exception", "teardown"):
                raise ValueError("another one on the way out")

    class Second(Recorder):
        def react(self, trainer: Any, event: str, *arguments: Any) -> None:
            self.events[-1] = (self.name, *self.events[-1])

    trainer = Trainer(max_steps=3, callbacks=[First("first", events), Second("second", events)])
    with pytest.raises(RuntimeError, match="the original error"):
        trainer.fit(ToyModule(), FIVE)

    assert events[-9:] == [
        ("first", "on_step_start", 2),
        ("second", "on_step_start", 2),
        ("first", "on_step_dispatched", 2),
        ("second", "on_step_dispatched", 2),
        ("first", "on_step_end", 2),
        ("first", "on_exception"),
        ("second", "on_exception"),
        ("second", "teardown", "fit"),
        ("first", "teardown", "fit"),
    ]


def test_the_docstring_tells_the_events_in_their_order() -> None:
    """The timeline in `callback.py` names every event, in the order in which HOST_EVENTS and the run have them."""
    assert callback.__doc__ is not None
    timeline = callback.__doc__.split("A run is:")[1].split("The device is kept busy")[0]
    names = set(callback.HOST_EVENTS) | set(callback.TRACED_EVENTS)
    told = [word for word in re.findall(r"\w+", timeline) if word in names]

    assert [name for name in told if name in callback.HOST_EVENTS] == list(callback.HOST_EVENTS)
    assert [name for name in told if name in callback.TRACED_EVENTS] == list(callback.TRACED_EVENTS)


def test_every_filters_the_step_events() -> None:
    """A callback with every=2 hears of each second step only, and of every log."""
    recorder = Recorder()
    recorder.every = 2
    Trainer(max_steps=4, log_every=1, callbacks=[recorder]).fit(ToyModule(), FIVE)

    assert [e for e in recorder.events if e[0].startswith("on_step")] == [
        ("on_step_start", 2),
        ("on_step_dispatched", 2),
        ("on_step_end", 2),
        ("on_step_start", 4),
        ("on_step_dispatched", 4),
        ("on_step_end", 4),
    ]
    assert [e for e in recorder.events if e[0] == "on_log"] == [("on_log", n) for n in (1, 2, 3, 4)]


def test_callbacks_come_before_loggers_before_checkpointing() -> None:
    """Order is by phase, and within a phase by place in the list; what a callback adds to the metrics a logger sees."""
    heard: list[tuple[str, float]] = []

    class Last(Callback):
        phase = "checkpoint"

        def on_log(self, trainer: Any, module: Any, step: int, metrics: dict[str, float]) -> None:
            heard.append((self.name, metrics["mine"]))

    class Logger(Last):
        phase = "logger"

    class Adds(Callback):
        def on_log(self, trainer: Any, module: Any, step: int, metrics: dict[str, float]) -> None:
            metrics["mine"] = metrics.get("mine", 0.0) + 1

    again = Adds()
    again.name = "again"
    Trainer(max_steps=1, callbacks=[Last(), Logger(), Adds(), again]).fit(ToyModule(), FIVE)

    assert heard == [("Logger", 2.0), ("Last", 2.0)]


def test_transforms_run_in_list_order() -> None:
    """Doubling after adding one is not adding one after doubling."""

    class AddOne(Callback):
        def transform_gradients(self, gradients: Any, context: Any) -> Any:
            return {"g": gradients["g"] + 1}, {"after_adding": gradients["g"] + 1}

    class Double(Callback):
        def transform_gradients(self, gradients: Any, context: Any) -> Any:
            return {"g": gradients["g"] * 2}, {}

    for callbacks, expected in (([AddOne(), Double()], 8.0), ([Double(), AddOne()], 7.0)):
        gradients: Any = {"g": mx.array(3.0)}
        for transform in callback.Events(callbacks).transforms:
            gradients, _ = transform(gradients, None)
        assert gradients["g"].item() == expected


def test_a_misspelt_event_is_refused_by_name() -> None:
    """A method that is called on_… and is no event would never be heard."""

    class Misspelt(Callback):
        def on_step_ends(self, trainer: Any, module: Any, step: int) -> None:
            """Never called."""

    with pytest.raises(TypeError, match=re.escape("Misspelt.on_step_ends is not an event; did you mean on_step_end?")):
        Trainer(callbacks=[Misspelt()])


def test_two_callbacks_of_one_name_are_refused() -> None:
    """Their saved states would overwrite each other."""
    with pytest.raises(ValueError, match="2 callbacks are named 'Recorder'; give each a name of its own"):
        Trainer(callbacks=[Recorder(), Recorder()])
