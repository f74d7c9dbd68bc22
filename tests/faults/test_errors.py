"""Whatever is raised in a run: the last finished step is saved once, and resuming from it is exact."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import Callback, Evaluation, LossOutput, ModelCheckpoint, NaNGuard, Trainer
from mlx_trainer.callback import HOST_EVENTS, TRACED_EVENTS
from mlx_trainer.checkpoint import CheckpointStore, verify
from mlx_trainer.state import random_state
from tests.faults.conftest import Tell
from tests.toy import ToyBatch, ToyLoader, ToyModule, toy_batches, weights

SIZES = (4, 3, 4, 2, 4, 4, 3)
STEPS = 16
NEVER_STARTED = ("setup", "on_fit_start")


class Deliberate(RuntimeError):
    """Raised on purpose."""


class Breaks(Callback):
    """Raises in `event` at its `nth` time, once; draws and remembers nothing else."""

    def __init__(self, event: str, nth: int, error: type[BaseException] = Deliberate) -> None:
        self.event, self.left, self.error = event, nth, error
        inherited = getattr(self, event)

        def broken(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise self.error(f"in {self.event}")
            return inherited(*arguments)

        setattr(self, event, broken)


def fit(folder: Path, *callbacks: Callback, module: ToyModule | None = None, **options: Any) -> tuple[Any, ...]:
    """Sixteen steps with an evaluation and a checkpoint now and then; what must be the same bit for bit at the end."""
    module = module or ToyModule()
    loader = options.pop("loader", None) or ToyLoader(toy_batches(SIZES))
    background = options.pop("background", True)
    own = [NaNGuard(), Evaluation(every=3), ModelCheckpoint(folder, every=5, background=background)]
    # What is raised in transform_gradients is of a callback which the resumed run has not: that decides on the numbers.
    options |= {"resume": "auto", "allow_changes": ("Breaks",)}
    trainer = Trainer(max_steps=STEPS, log_every=2, callbacks=[*callbacks, *own], **options)
    result = trainer.fit(module, loader, toy_batches((3, 2), seed=9))
    optimizer = {name: array.tolist() for name, array in tree_flatten(trainer.optimizer.state)}
    loss = None if trainer.state.evaluation is None else trainer.state.evaluation.loss
    return loss, weights(module), optimizer, random_state(), result.steps, result.counts


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    """The end of a run without errors, by its number of micro-batches."""
    ends: dict[int, tuple[Any, ...]] = {}

    def end(accumulate: int) -> tuple[Any, ...]:
        if accumulate not in ends:
            ends[accumulate] = fit(tmp_path_factory.mktemp("whole"), accumulate=accumulate)
        return ends[accumulate]

    return end


def saved_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints, each verified."""
    paths = CheckpointStore(folder / "checkpoints").list()
    for path in paths:
        verify(path)
    return [int(path.name.removeprefix("step-")) for path in paths]


def nth(event: str) -> int:
    """A time at which steps were already done: the fourth of what comes each step, the second of the rest."""
    return {"on_epoch_start": 2, "on_log": 3, **dict.fromkeys(TRACED_EVENTS, 2)}.get(
        event, 4 if event.startswith("on_step") else 1
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("event", [e for e in (*HOST_EVENTS, *TRACED_EVENTS) if e != "on_exception"])
def test_an_error_in_any_event(
    event: str, accumulate: int, tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]], tell: Tell
) -> None:
    """It is raised as it is, the step before it is there, and the resumed run ends as one without the error."""
    breaks = Breaks(event, nth(event))
    if event == "teardown":  # isolated: logged, not raised
        fit(tmp_path, breaks, accumulate=accumulate)
    else:
        with pytest.raises(Deliberate, match=f"in {event}"):
            fit(tmp_path, breaks, accumulate=accumulate)

    saved = saved_steps(tmp_path)
    assert (saved == []) == (event in NEVER_STARTED)
    ended = event in ("on_fit_end", "teardown")  # then nothing is left to evaluate
    assert fit(tmp_path, accumulate=accumulate)[ended:] == undisturbed(accumulate)[ended:]
    tell(
        f"10 error in {event}, {accumulate} micro-batches", f"saved at step {saved[-1] if saved else 0}, resumed: same"
    )


@pytest.mark.parametrize(("event", "last"), [("on_step_dispatched", 4), ("on_step_end", 4), ("on_step_start", 3)])
def test_the_step_saved_is_the_last_one_finished(event: str, last: int, tmp_path: Path) -> None:
    """A step that was dispatched is finished; one that was not is not."""
    with pytest.raises(Deliberate):
        fit(tmp_path, Breaks(event, 4))
    assert saved_steps(tmp_path) == [last]


class BrokenLoss(ToyModule):
    """Fails when it meets rows of a new length, in the training or the held-out rows."""

    broken = True

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def training_loss(self, batch: ToyBatch) -> LossOutput:
        if self.broken and len(batch.y) == self.rows:
            raise Deliberate("in the loss")
        return super().training_loss(batch)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_an_error_in_the_loss_while_it_is_traced(
    rows: int, accumulate: int, tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    """In whichever micro-batch of the window: position, randomness and parameters are those before the window."""
    with pytest.raises(Deliberate, match="in the loss"):
        fit(tmp_path, module=BrokenLoss(rows), accumulate=accumulate)
    assert fit(tmp_path, accumulate=accumulate) == undisturbed(accumulate)


def test_an_error_in_an_evaluation_while_it_is_traced(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    """The training goes on from arrays that were not spoilt."""

    class Fails(ToyModule):
        def validation_loss(self, batch: ToyBatch) -> LossOutput:
            output = super().validation_loss(batch)
            if len(batch.y) == 2:
                raise Deliberate("in the held-out loss")
            return output

    with pytest.raises(Deliberate, match="in the held-out loss"):
        fit(tmp_path, module=Fails())
    assert saved_steps(tmp_path) == [3]
    assert fit(tmp_path) == undisturbed(1)


class BrokenLoader(ToyLoader):
    """Raises when it is asked for its `nth` batch."""

    def __init__(self, nth: int) -> None:
        super().__init__(toy_batches(SIZES))
        self.nth = nth

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.nth -= 1
            if self.nth == 0:
                raise Deliberate("in the loader")
            yield batch


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("nth", range(2, 16))
def test_an_error_in_the_loader(
    nth: int, accumulate: int, tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    """At any batch, inside a window or at its edge: no batch is lost, none is used twice."""
    with pytest.raises(Deliberate, match="in the loader"):
        fit(tmp_path, loader=BrokenLoader(nth), accumulate=accumulate)
    assert fit(tmp_path, accumulate=accumulate) == undisturbed(accumulate)


def test_an_error_of_the_save_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The original error is the one raised; that of the save is logged, with the original as its context."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_trainer.checkpoint.store.seal", full)
    with caplog.at_level(logging.ERROR), pytest.raises(Deliberate, match="in on_step_end"):
        fit(tmp_path, Breaks("on_step_end", 4))

    (record,) = [record for record in caplog.records if "failed in on_exception" in record.message]
    assert record.exc_info is not None
    contexts, error = [], record.exc_info[1]
    while error is not None:
        contexts.append(type(error))
        error = error.__context__
    assert Deliberate in contexts
    assert saved_steps(tmp_path) == []


def test_what_was_saved_is_not_saved_again(tmp_path: Path) -> None:
    """An error after the checkpoint of a step leaves that one alone; so does one at once after resuming."""
    with pytest.raises(Deliberate):
        fit(tmp_path, Breaks("on_checkpoint_saved", 1), background=False)
    assert saved_steps(tmp_path) == [5]
    before = (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").stat().st_mtime_ns
    with pytest.raises(Deliberate):
        fit(tmp_path, Breaks("on_step_start", 1))
    assert (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").stat().st_mtime_ns == before


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """A NaN in the parameters, which nobody guards here, is no state to go on from."""

    class Poisons(Callback):
        def on_step_end(self, trainer: Trainer, module: Any, step: int) -> None:
            if step == 4:
                module.model.layers[0].bias = module.model.layers[0].bias * mx.nan
                raise Deliberate("after the NaN")

    with pytest.raises(Deliberate, match="after the NaN"):
        fit(tmp_path, Poisons())
    assert saved_steps(tmp_path) == []


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    """With save_on_exception=False nothing is written on the way out."""
    with pytest.raises(Deliberate):
        Trainer(
            max_steps=4, callbacks=[Breaks("on_step_end", 2), ModelCheckpoint(tmp_path, save_on_exception=False)]
        ).fit(ToyModule(), toy_batches())
    assert saved_steps(tmp_path) == []


def test_a_keyboard_interrupt_saves_nothing(tmp_path: Path) -> None:
    """At once means at once."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, Breaks("on_step_end", 4, KeyboardInterrupt))
    assert saved_steps(tmp_path) == []
