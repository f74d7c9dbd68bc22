"""A backend without memory: once more where that can help, else a message that says what to change."""

import gc
import logging
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import Callback, ModelCheckpoint, Trainer, failure
from mlx_trainer.trainer import TrainingError
from tests.toy import ToyModule, toy_batches, weights

NO_MEMORY = "[malloc] Unable to allocate 8388608 bytes."


class Backend:
    """MLX's `async_eval` or `eval`, which raises at some of its calls, before or after it has done them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *failing: int, text: str = NO_MEMORY) -> None:
        self.calls, self.failing, self.text, self.original = 0, failing, text, getattr(mx, name)
        monkeypatch.setattr(mx, name, self)

    def __call__(self, *trees: Any) -> None:
        self.calls += 1
        if self.calls in self.failing:
            raise RuntimeError(self.text)
        self.original(*trees)


def end(accumulate: int, **options: Any) -> tuple[Any, ...]:
    """What six steps leave."""
    module = ToyModule()
    trainer = Trainer(max_steps=6, max_epochs=9, accumulate=accumulate, **options)
    trainer.fit(module, toy_batches())
    return weights(module), [(name, array.tolist()) for name, array in tree_flatten(trainer.optimizer.state)]


@pytest.mark.parametrize(
    "text", [NO_MEMORY, "cudaMallocAsync(&p, n) failed: out of memory", "Could not load C++ shared library"]
)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("call", [1, 4, 5])
def test_a_step_that_finds_no_memory_is_dispatched_once_more(
    call: int, accumulate: int, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At whichever call of the backend: the run ends with the same bits, and the log says that it happened."""
    expected = end(accumulate)
    backend = Backend(monkeypatch, "async_eval", call, text=text)
    with caplog.at_level(logging.WARNING):
        assert end(accumulate) == expected
    assert backend.calls > call
    assert caplog.messages == [f"a step could not be dispatched, trying once more: {text}"]


@pytest.mark.parametrize(
    ("accumulate", "calls", "saved"),
    [
        *[(1, (9, 10), [2, 4]), (1, (10, 11), [2, 4]), (1, (8, 9), [2])],
        *[(2, (16, 17), [2, 4]), (2, (18, 19), [2, 4]), (2, (19, 20), [2, 4]), (2, (13, 14), [2, 3])],
    ],
    ids=[
        *["K=1, the last update", "K=1, the gradient", "K=1, a new shape"],
        *["a micro-batch", "the last update", "the sums", "a micro-batch of a new shape"],
    ],
)
def test_twice_without_memory_ends_the_run_with_advice(
    accumulate: int,
    calls: tuple[int, int],
    saved: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Arrays that belong to no finished step are not saved; those of a step that was traced were put back, and are."""
    Backend(monkeypatch, "async_eval", *calls)
    with pytest.raises(TrainingError, match=r"no memory was left for step \d .*: a smaller batch_tokens or batch_size"):
        end(accumulate, callbacks=[ModelCheckpoint(tmp_path, every=2, background=False)])
    assert sorted(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step-*")) == saved
    assert "failed in on_exception" not in caplog.text


def test_an_error_at_the_wait_ends_the_run_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step was already given what it spoilt, so nothing can be tried again."""

    class Later(Callback):
        def on_step_start(self, trainer: Trainer, module: Any, step: int) -> None:
            if step == 3:
                Backend(monkeypatch, "eval", 1)

    with pytest.raises(TrainingError, match=r"no memory was left for step 3 \(\[malloc\] Unable to allocate 8388608"):
        end(1, callbacks=[Later()])


def test_a_last_update_without_memory_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried twice at the end of the run, and then once more by whoever reads the weights."""
    expected = end(1)
    backend = Backend(monkeypatch, "async_eval", 13, 14)
    assert end(1) == expected
    assert backend.calls == 14


def test_other_errors_of_the_backend_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong shape is not tried again and not called a lack of memory."""
    backend = Backend(monkeypatch, "async_eval", 3, text="[matmul] shapes do not fit")
    with pytest.raises(RuntimeError, match="shapes do not fit") as caught:
        end(1)
    assert not isinstance(caught.value, TrainingError)
    assert backend.calls == 3


@pytest.mark.parametrize("what", ["model", "optimizer"])
def test_a_container_replaced_after_compiling_is_refused(what: str) -> None:
    """It would go on training the old one in silence."""

    class Replaces(Callback):
        def on_step_end(self, trainer: Trainer, module: Any, step: int) -> None:
            if what == "model":
                del module.model
                module.setup("fit")
            else:
                trainer.optimizer.state = dict(trainer.optimizer.state)

    with pytest.raises(TrainingError, match="was replaced after the step was compiled"):
        end(1, callbacks=[Replaces()])


def test_a_second_run_has_the_memory_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What refers to itself is collected as a run starts, before it loads anything, where arrays are large."""

    def run() -> "weakref.ref[ToyModule]":
        module = ToyModule()
        Trainer(max_steps=2).fit(module, toy_batches())
        return weakref.ref(module)

    gc.disable()
    try:
        first = run()
        second = run()
        assert first() is not None
        monkeypatch.setattr(failure, "LARGE", 0)
        run()
        assert first() is second() is None
    finally:
        gc.enable()
