"""The training timeline, and how callbacks take part in it.

One step is one optimizer update; micro-batches are not events. A run is:

    setup -> on_fit_start
      on_epoch_start
        on_step_start                                      host
          K x (forward, loss sum, gradients)               traced
          transform_gradients                              traced, in list order
          accept_update                                    traced
          optimizer update where accepted                  traced
          update_arrays                                    traced, kept where accepted
        on_step_dispatched                                 host; the device still works on the step before
        on_step_end                                        host; metrics are still lazy arrays
        on_log                                             host, when due: the one place values are read
        on_evaluation_start, on_evaluation_end             when due
        on_checkpoint -> on_checkpoint_saved               when due, after evaluation
        stop requests are honoured here and nowhere earlier
      on_epoch_end
    on_fit_end
    on_exception     each callback isolated; the original error is always raised again
    teardown         always, in reverse order, each isolated

The device is kept busy: the log of step k is read after step k+1 was dispatched, so `on_log(k)` comes after
`on_step_dispatched(k+1)`, unless an evaluation, a checkpoint or the end of an epoch is due at step k, which read it at
once. A checkpoint is a log point, also between two of them.

Callbacks ask, the trainer acts: `trainer.request_stop(reason)`, `request_evaluation()`, `request_checkpoint()`,
`request_rollback(reason)`.

A callback can have arrays of its own inside the compiled step, such as recent losses or an average of the adapters:
`initial_arrays(module)` makes them at the start of a run, `update_arrays` gives their next values, and in between they
are `self.arrays`, which the other traced methods may read. They are part of the step's state as parameters are:
updated in place, left as they were where a guard refuses the update, saved bit for bit in checkpoints, and taken back
by a rollback.
"""

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import mlx.core as mx

from mlx_trainer.traced import Gradients as Gradients  # for callbacks that transform them

if TYPE_CHECKING:
    from mlx_trainer.evaluation import EvalMetrics
    from mlx_trainer.module import TrainerModule
    from mlx_trainer.step import StepContext
    from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)

Phase = Literal["callback", "logger", "checkpoint"]
PHASES: tuple[Phase, ...] = ("callback", "logger", "checkpoint")

HOST_EVENTS = (
    "setup",
    "on_fit_start",
    "on_epoch_start",
    "on_step_start",
    "on_step_dispatched",
    "on_step_end",
    "on_log",
    "on_evaluation_start",
    "on_evaluation_end",
    "on_checkpoint",
    "on_checkpoint_saved",
    "on_epoch_end",
    "on_fit_end",
    "on_exception",
    "teardown",
)
TRACED_EVENTS = ("transform_gradients", "accept_update", "update_arrays")


class Callback:
    """Override what you need; a method that is not overridden costs nothing.

    `every=N` makes the three events of a step come at each Nth step only. `phase` orders callbacks: plain
    callbacks in list order, then loggers (they see what others added to the metrics), then checkpointing.
    """

    name: str
    """The key of this callback's state in a checkpoint; unique in a run. The class name unless set."""
    every: int | None = None
    phase: ClassVar[Phase] = "callback"
    arrays: dict[str, Any]
    """What `initial_arrays` made and `update_arrays` keeps up to date; only where that is overridden."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    def setup(self, trainer: "Trainer", module: "TrainerModule", stage: str) -> None:
        """Before anything is loaded, `stage` being "fit", "validate" or "predict": the place to refuse early."""

    def on_fit_start(self, trainer: "Trainer", module: "TrainerModule") -> None:
        """The model is loaded, the optimizer built, a checkpoint restored."""

    def on_epoch_start(self, trainer: "Trainer", module: "TrainerModule", epoch: int) -> None:
        """Epochs count from 0."""

    def on_step_start(self, trainer: "Trainer", module: "TrainerModule", step: int) -> None:
        """Steps count from 1."""

    def on_step_dispatched(self, trainer: "Trainer", module: "TrainerModule", step: int) -> None:
        """The step was handed to the device and the host has not waited for anything yet: for clocks."""

    def on_step_end(self, trainer: "Trainer", module: "TrainerModule", step: int) -> None:
        """`trainer.step_output` holds the step's arrays, still lazy: reading one here would stall the device."""

    def on_log(self, trainer: "Trainer", module: "TrainerModule", step: int, metrics: dict[str, float]) -> None:
        """Means since the last log, as floats; what is added to `metrics` here reaches the loggers."""

    def on_evaluation_start(self, trainer: "Trainer", module: "TrainerModule", step: int) -> None:
        """The model is still in training mode."""

    def on_evaluation_end(self, trainer: "Trainer", module: "TrainerModule", step: int, metrics: "EvalMetrics") -> None:
        """The model is in training mode again."""

    def on_checkpoint(self, trainer: "Trainer", module: "TrainerModule", step: int) -> Path | None:
        """Write a checkpoint (`trainer.write_checkpoint(directory)`) and return its path.

        Or let `trainer.save_in_background` write it, and return None.
        """
        return None

    def on_checkpoint_saved(self, trainer: "Trainer", module: "TrainerModule", path: Path) -> None:
        """The checkpoint at `path` is complete; in a later step than `on_checkpoint`'s where a thread wrote it."""

    def on_epoch_end(self, trainer: "Trainer", module: "TrainerModule", epoch: int) -> None:
        """Also after a stop in the middle of the epoch."""

    def on_fit_end(self, trainer: "Trainer", module: "TrainerModule") -> None:
        """The run ended well; `trainer.stop_reason` says why."""

    def on_exception(self, trainer: "Trainer", module: "TrainerModule", error: BaseException) -> None:
        """The run failed; `error` is raised again afterwards."""

    def teardown(self, trainer: "Trainer", module: "TrainerModule", stage: str) -> None:
        """Always, whatever happened; close what `setup` opened."""

    def transform_gradients(
        self, gradients: Gradients, context: "StepContext"
    ) -> tuple[Gradients, Mapping[str, mx.array]]:
        """Traced, pure: the gradients to use, and scalars to log under `train/`."""
        return gradients, {}

    def accept_update(self, loss: mx.array, gradients: Gradients, context: "StepContext") -> mx.array:
        """Traced, pure: a bool scalar; where False, parameters and optimizer state stay bit for bit as they are."""
        return mx.array(True)

    def initial_arrays(self, module: "TrainerModule") -> dict[str, Any]:
        """A tree of arrays for `self.arrays`, made once in a run; what a checkpoint holds takes their place."""
        return {}

    def update_arrays(self, arrays: dict[str, Any], parameters: Any, context: "StepContext") -> dict[str, Any]:
        """Traced, pure: the next `arrays`, of the same shapes, given the trainable parameters after the update."""
        return arrays

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def fingerprint(self) -> Mapping[str, Any]:
        """What of it decides on the trained numbers: a resumed run must have the same, or be allowed the change."""
        return {self.name: "transforms gradients"} if overrides(self, "transform_gradients") else {}

    def result_parameters(self, module: "TrainerModule") -> Any:
        """A tree of what the finished result holds in place of the trained parameters, such as an average of them."""
        return {}

    def latest_checkpoint(self) -> Path | None:
        """The newest good checkpoint of this run, for `resume="auto"`; only what writes checkpoints knows one."""
        return None


class Events:
    """The overridden methods of a list of callbacks, bound once, so that an event that nobody hears costs nothing."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = in_phase_order(callbacks)
        for callback in self.callbacks:
            refuse_unknown_events(callback)
        refuse_equal_names(self.callbacks)
        self._bound = {event: self._bind(event) for event in HOST_EVENTS}
        self.transforms = [method for _, method in self._bind("transform_gradients")]
        self.guards = {callback.name: method for callback, method in self._bind("accept_update")}
        self.updates = {callback.name: method for callback, method in self._bind("update_arrays")}

    def _bind(self, event: str) -> list[tuple[Callback, Callable[..., Any]]]:
        return [(callback, getattr(callback, event)) for callback in self.callbacks if overrides(callback, event)]

    def make_arrays(self, module: "TrainerModule") -> dict[str, dict[str, Any]]:
        """Give each callback that updates arrays its first ones; the containers, by the callback's name."""
        for callback, _ in (bound := self._bind("update_arrays")):
            callback.arrays = callback.initial_arrays(module)
        return {callback.name: callback.arrays for callback, _ in bound}

    @contextmanager
    def result_in(self, module: "TrainerModule") -> Iterator[None]:
        """Let `module` have what the finished result holds, for good unless the block fails."""
        trained = module.model.trainable_parameters()
        try:
            for callback in self.callbacks:
                module.model.update(callback.result_parameters(module))
            yield
        except BaseException:
            module.model.update(trained)  # which is what a checkpoint on the way out must hold
            raise

    def latest_checkpoint(self) -> Path | None:
        """The newest good checkpoint that a callback knows of."""
        found = (callback.latest_checkpoint() for callback in self.callbacks)
        return next((path for path in found if path is not None), None)

    def emit(self, event: str, *arguments: Any) -> list[Any]:
        """Call every listener in order; an error ends the run."""
        return [method(*arguments) for _, method in self._bound[event]]

    def emit_step(self, event: str, trainer: "Trainer", module: "TrainerModule", step: int) -> None:
        """As `emit`, to the listeners whose turn this step is."""
        for callback, method in self._bound[event]:
            if callback.every is None or step % callback.every == 0:
                method(trainer, module, step)

    def emit_isolated(self, event: str, *arguments: Any) -> None:
        """Call every listener, for `teardown` in reverse order; an error is logged and stops nobody else."""
        for callback, method in self._bound[event][:: -1 if event == "teardown" else 1]:
            try:
                method(*arguments)
            except Exception:
                logger.exception("callback %s failed in %s", callback.name, event)


def in_phase_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Callbacks, then loggers, then checkpointing, each in list order."""
    return sorted(callbacks, key=lambda callback: PHASES.index(callback.phase))


def overrides(callback: Callback, event: str) -> bool:
    """Whether the callback has a method of its own for `event`."""
    return event in vars(callback) or getattr(type(callback), event) is not getattr(Callback, event)


def refuse_unknown_events(callback: Callback) -> None:
    """Raise TypeError where a method is called `on_…` and no event is: a misspelt event would never be heard."""
    for name in dir(callback):
        if name.startswith("on_") and name not in HOST_EVENTS and callable(getattr(callback, name)):
            nearest = difflib.get_close_matches(name, HOST_EVENTS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else f"; events are {', '.join(HOST_EVENTS)}"
            raise TypeError(f"{type(callback).__name__}.{name} is not an event{hint}")


def refuse_equal_names(callbacks: Sequence[Callback]) -> None:
    """Raise ValueError where two callbacks have one name: their saved states would overwrite each other."""
    names = [callback.name for callback in callbacks]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} callbacks are named {name!r}; give each a name of its own (callback.name = …)"
            )
