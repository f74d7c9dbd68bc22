from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer.callbacks import LambdaCallback
from tests.callbacks.toy import fit


def test_functions_are_called_at_their_events() -> None:
    """With the event's own arguments, without a self."""
    told: list[tuple[Any, ...]] = []
    callback = LambdaCallback(
        on_fit_start=lambda trainer, module: told.append(("fit", type(module).__name__)),
        on_step_end=lambda trainer, module, step: told.append(("step", step)),
        on_epoch_end=lambda trainer, module, epoch: told.append(("epoch", epoch)),
        every=3,
    )
    fit([callback])
    assert told == [("fit", "Regression"), ("step", 3), ("step", 6), ("epoch", 0)]


def test_traced_events_are_taken_too() -> None:
    """A guard that refuses all updates leaves the model where it was."""
    losses: list[float] = []
    refuse = LambdaCallback("refuse", accept_update=lambda loss, gradients, context: mx.array(False))
    note = LambdaCallback("note", on_evaluation_end=lambda trainer, module, step, m: losses.append(m.loss))
    ask = LambdaCallback("ask", every=3, on_step_end=lambda trainer, module, step: trainer.request_evaluation())
    fit([refuse, note, ask], validation=None, overfit_batches=2, max_epochs=3)
    assert len(losses) == 2
    assert losses[0] == losses[1]


def test_two_need_two_names() -> None:
    """The name is the first argument; equal ones are refused by the trainer."""
    with pytest.raises(ValueError, match="2 callbacks are named 'LambdaCallback'"):
        fit([LambdaCallback(), LambdaCallback()])
    fit([LambdaCallback(), LambdaCallback("second")])


def test_a_misspelt_event_is_refused_with_the_nearest() -> None:
    """It would never be heard otherwise."""
    with pytest.raises(TypeError, match=r"on_step_ended is not an event; did you mean on_step_end\?"):
        LambdaCallback(on_step_ended=print)
    with pytest.raises(TypeError, match="zzz is not an event; events are setup, on_fit_start"):
        LambdaCallback(zzz=print)


def test_every_below_one_is_refused() -> None:
    """The error names the callback."""
    with pytest.raises(ValueError, match="mine: every is -1"):
        LambdaCallback("mine", every=-1)
