"""Checkpoints, and the finished result."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from attrs import asdict

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.monitor import Best, check_mode, improves, monitored
from mlx_trainer.callbacks.places import place, writable_folder
from mlx_trainer.callbacks.timing import check_every
from mlx_trainer.checkpoint import CheckpointStore, check_level, same_run, write_finite
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.folders import same_files
from mlx_trainer.module import TrainerModule
from mlx_trainer.snapshot import can_be_frozen
from mlx_trainer.traced import nbytes
from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)


class ModelCheckpoint(Callback):
    """Saves `directory/checkpoints/step-…` every `every` steps and after the last one, and the result at the end.

    `directory` is the trainer's run folder unless given. The newest `keep_last` stay (None: all). With `monitor`, a
    metric of the evaluations such as "val/loss", each evaluation better than all before it is saved too, and the best
    one stays; `mode` says whether "min" or "max" is better. NaN and infinity are never best, a tie keeps the earlier.
    When the run ends well the module is saved into `directory/<module.artifact>`. `save_at_end=False` leaves out the
    checkpoint after the last step, `save_on_exception=False` that of the last finished step of a run that fails. Raises
    OSError at the start for a folder that cannot be written.

    A checkpoint is written in the background: the loop takes references to the step's arrays and goes on; a thread
    writes them and reads them back. `on_checkpoint_saved` comes at the end of the step in which that is done, and so
    does CheckpointError where it fails. One is written at a time: the next one that is due waits for it, and so does
    the end of the run, however it ends, except at a second Ctrl-C. A module with a `save` of its own is saved in the
    loop as with `background=False`: what else it reads, training might change meanwhile.

    A run has an id, which its checkpoints carry. What another run left in the folder is not used, not counted and not
    removed, and told once; a run that is resumed is the same run, except from an earlier checkpoint than its newest.
    Nobody else can write into the folder meanwhile. Raises CheckpointError at the start where another run writes there,
    or the disk has not the room that the checkpoints to be kept and a new one need; and later for a checkpoint or
    result with parameters that are not finite, which is not written.

    `compress` is a level of zstd, from 1 to 19, for the optimizer state, which is read back bit for bit. It is off, as
    numbers of training hardly shrink: AdamW's state of LoRA adapters by 7 % at any level, at 250 MB/s.

    Costs one comparison a step; at a checkpoint what `perf/checkpoint_stall_us` says in the next log, and until it is
    written the memory of the trained parameters and the optimizer state once more. With `background=False` a checkpoint
    waits for the step, then writes its files and reads them back.
    """

    phase = "checkpoint"

    def __init__(
        self,
        directory: str | Path | None = None,
        every: int | None = 100,
        keep_last: int | None = 3,
        monitor: str | None = None,
        mode: str = "min",
        save_at_end: bool = True,
        background: bool = True,
        save_on_exception: bool = True,
        compress: int | None = None,
    ) -> None:
        if keep_last is not None and keep_last < 1:
            raise ValueError(f"ModelCheckpoint: keep_last is {keep_last}; it must be 1 or more, or None to keep all")
        self.directory, self.every, self.keep_last = directory, check_every(every, "ModelCheckpoint"), keep_last
        self.monitor, self.mode, self.save_at_end = monitor, check_mode(mode), save_at_end
        self.background, self.save_on_exception = background, save_on_exception
        self.compress = check_level(compress, "ModelCheckpoint")
        self._store: CheckpointStore | None = None
        self._lock = ExitStack()
        self._reset()

    def _reset(self) -> None:
        self._found: Path | None = None
        self.best: Best | None = None
        self._candidate: Best | None = None
        self._saved_step: int | None = None

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints of the run; known once `fit` has begun."""
        if self._store is None:
            raise RuntimeError("ModelCheckpoint has no folder before Trainer.fit has begun")
        return self._store

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint with the best monitored value, or None where there is none (any more)."""
        if self.best is None:
            return None
        path = self.store.path(self.best.step)
        return path if path.is_dir() else None

    def latest_checkpoint(self) -> Path | None:
        """The newest one that is whole."""
        self._found = self.store.latest()
        return self._found

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Refuse a folder that cannot be written, or that another run writes, before anything is loaded."""
        self._fitting = stage == "fit"
        if self._fitting:
            folder = place(self.directory, trainer, "", "ModelCheckpoint") / "checkpoints"
            self._store = CheckpointStore(writable_folder(folder), self.keep_last, compress=self.compress)
            self._reset()
            self._lock.enter_context(self._store.held())

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Know which run this is, what is its own in the folder, and whether there is room for what it will save.

        A restored best one that is in another folder, or removed, is forgotten: it cannot be kept.
        """
        chosen = trainer.resume not in (None, "auto")
        begin = (Path(str(trainer.resume)) if chosen else self._found) if trainer.state.step else None
        if self.best is not None and not same_run(self.best_checkpoint, begin):
            logger.warning("the best checkpoint so far, of step %d, is not in %s", self.best.step, self.store.directory)
            self.best = None
        self._saved_step = trainer.state.step  # what a run begins with need not be saved
        sizes = nbytes(module.model.trainable_parameters()), nbytes(trainer.optimizer.state)
        store = self.store.of_run(begin, trainer.state.step, chosen=chosen)
        self._store = store.expecting(*sizes, best=self.monitor is not None)
        self._store.begin(trainer.state.step)

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Ask, at each step that `every` names."""
        if self.every is not None:
            trainer.request_checkpoint()

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Ask, where it is the best evaluation so far, or where it made another callback stop the run."""
        if not self._fitting:
            return
        if self.monitor is not None and step > 0:
            value = monitored(self.monitor, metrics.as_dict(), "ModelCheckpoint")
            if improves(value, None if self.best is None else self.best.value, self.mode):
                self._candidate = Best(step, value)
                trainer.request_checkpoint()
        self._ask_at_end(trainer)

    def on_epoch_end(self, trainer: Trainer, module: TrainerModule, epoch: int) -> None:
        """Ask, after the last step."""
        self._ask_at_end(trainer)

    def _ask_at_end(self, trainer: Trainer) -> None:
        if self.save_at_end and trainer.stop_reason and self._unsaved(trainer):
            trainer.request_checkpoint()

    def on_checkpoint(self, trainer: Trainer, module: TrainerModule, step: int) -> Path | None:
        """Save; the former best one is removed only once the new one is complete."""
        if self._candidate is not None and self._candidate.step == step:
            self.best = self._candidate  # before writing: the checkpoint holds this callback's state
        self._saved_step = step
        store, protect = self.store, self.best_checkpoint
        if self.background and can_be_frozen(module):
            trainer.save_in_background(lambda write: store.save(step, write, protect))
            return None
        with trainer.paused():
            return store.save(step, trainer.write_checkpoint, protect)

    def on_exception(self, trainer: Trainer, module: TrainerModule, error: BaseException) -> None:
        """Save the last finished step, unless it is saved, is not finite, or nothing but the end is wanted."""
        wanted = self.save_on_exception and not isinstance(error, KeyboardInterrupt)
        if wanted and self._unsaved(trainer) and trainer.is_sound():
            self._save_now(trainer)

    def _unsaved(self, trainer: Trainer) -> bool:
        return self._saved_step not in (None, trainer.state.step)  # None: the run has not begun

    def _save_now(self, trainer: Trainer) -> Path:
        self._saved_step = trainer.state.step
        return self.store.save(trainer.state.step, trainer.write_checkpoint, self.best_checkpoint)

    def on_fit_end(self, trainer: Trainer, module: TrainerModule) -> None:
        """Write the result, unless a finished run was resumed and it is there already.

        Before it the last step, where a signal came too late for `on_epoch_end` to see it.
        """
        if self.save_at_end and self._unsaved(trainer):
            trainer.events.emit("on_checkpoint_saved", trainer, module, self._save_now(trainer))
        result = self.store.directory.parent / module.artifact
        if trainer.step_output is None and same_files(result, self.store.latest()):
            logger.info("this run has ended already (%s): there is nothing left to do", trainer.stop_reason)
            return
        with trainer.events.result_in(module):
            write_finite(result, module.save)

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Let other runs have the folder."""
        self._lock.close()

    def state_dict(self) -> dict[str, Any]:
        """The best value of which metric, and its step."""
        return {} if self.best is None else {"monitor": self.monitor, "best": asdict(self.best)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, unless it is another metric's."""
        if state["monitor"] == self.monitor:
            self.best = Best(**state["best"])
