"""What a checkpoint holds beside the module's own files: optimizer state, position, randomness, callbacks."""

import copy
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_trainer.callback import Callback
from mlx_trainer.checkpoint import FORMAT_VERSION, OPTIMIZER_FILE, CheckpointError, check_finite, load_tensors, verify
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.loaders import Loader, ResumableLoader, place
from mlx_trainer.module import TrainerModule, check_parameters
from mlx_trainer.resuming import Identity
from mlx_trainer.state import TrainingState, key_to_seed, random_key, restore_random_state
from mlx_trainer.traced import assign, nbytes

if TYPE_CHECKING:
    from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
CALLBACKS_FILE = "callbacks.safetensors"
"""Arrays of callbacks; only where one has any."""


@attrs.frozen
class Snapshot:
    """The living parts of a run, which a checkpoint holds."""

    module: TrainerModule
    optimizer: optimizers.Optimizer
    state: TrainingState
    callbacks: Sequence[Callback]
    loader: Loader
    identity: Identity
    arrays: Mapping[str, dict[str, Any]] = attrs.field(factory=dict)
    """Arrays of callbacks, by name: the containers that the compiled step fills."""
    allowed: Collection[str] = ()
    """What may differ from a checkpoint that is read (see `Identity.check`)."""

    @classmethod
    def of(cls, trainer: "Trainer", loader: Loader) -> Self:
        """The parts of a run whose model and optimizer are built, at its first step."""
        module, events = trainer.module, trainer.events
        trainer.state.loader = place(loader)
        parts = module, trainer.optimizer, trainer.state, events.callbacks, loader
        return cls(*parts, Identity.of(trainer, loader), events.make_arrays(module), trainer.allow_changes)

    def write(self, directory: Path) -> None:
        """Fill `directory` with the run as it stands between two steps."""
        self.taken().write(directory)

    def taken(self, frozen: bool = False) -> "TakenSnapshot":
        """The run between two steps; `frozen`: it can be written at any later time, while the training goes on.

        Reads nothing from the device. No array is copied, except on CUDA: training makes new ones and leaves the old as
        they are.
        """
        contents = {
            **attrs.asdict(self.state),
            "callbacks": {callback.name: saved for callback in self.callbacks if (saved := callback.state_dict())},
        }
        module, optimizer = self.module, dict(tree_flatten(self.optimizer.state))
        arrays = dict(tree_flatten(self.arrays))
        if frozen:
            module = frozen_copy(module)
        if frozen and mx.cuda.is_available():
            module.model.update(copied_arrays(module.model.trainable_parameters()))
            optimizer, arrays = copied_arrays(optimizer), copied_arrays(arrays)
        return TakenSnapshot(module, optimizer, arrays, random_key(), self.identity, json.dumps(contents))

    def read(self, directory: Path) -> None:
        """Put everything back; the run continues bit for bit.

        Raises CheckpointError, and changes nothing, where anything does not fit, or differs that decides on the numbers
        and is not `allowed`.
        """
        contents = verified(directory)
        self.identity.check(directory, contents, self.allowed)
        self._restore(directory, contents)
        if contents.get("evaluation") is not None:
            contents["evaluation"] = EvalMetrics(**contents["evaluation"])
        for field in attrs.fields(TrainingState):
            setattr(self.state, field.name, contents.get(field.name, getattr(self.state, field.name)))
        self._read_callbacks(contents["callbacks"])
        if isinstance(self.loader, ResumableLoader) and contents["loader"] is not None:
            self.loader.load_state_dict(contents["loader"])
        logger.info("resumed from %s: step %d, epoch %d", directory, self.state.step, self.state.epoch)

    def rewind(self, directory: Path) -> int:
        """Put back what the compiled step updates; position, counts and callbacks' own state stay.

        Returns the step of the checkpoint. Raises CheckpointError as `read` does.
        """
        contents = verified(directory)
        self._restore(directory, contents)
        return int(contents["step"])

    def _restore(self, directory: Path, contents: Mapping[str, Any]) -> None:
        """All in place: a compiled step may have captured it."""
        try:
            optimizer = self._loaded_optimizer(directory / OPTIMIZER_FILE)
            self.module.load(directory)  # changes nothing where it does not fit
        except ValueError as error:
            raise CheckpointError(f"cannot resume from {directory}: {error}") from error
        assign(self.optimizer.state, optimizer)
        self._read_arrays(directory / CALLBACKS_FILE)
        restore_random_state(contents["random_state"])

    def _loaded_optimizer(self, path: Path) -> Any:
        fresh = dict(tree_flatten(self.optimizer.state))
        loaded = load_tensors(path, most_bytes=2 * nbytes(fresh) + (1 << 24))
        check_parameters(fresh, loaded, str(path))
        if {"learning_rate", "all"} & set(self.allowed) and "learning_rate" in fresh:
            loaded["learning_rate"] = fresh["learning_rate"]  # a constant one is a part of the state
        return tree_unflatten(list(loaded.items()))

    def _read_arrays(self, path: Path) -> None:
        loaded = load_tensors(path) if path.exists() else {}
        current = dict(tree_flatten(self.arrays))
        fitting = {name: a for name, a in loaded.items() if name in current and fits(a, current[name])}
        if fitting.keys() != current.keys() | loaded.keys():
            odd = ", ".join(sorted((current.keys() | loaded.keys()) - fitting.keys()))
            logger.warning("%s and this run's callbacks differ in %s, which begins anew or is left out", path, odd)
        assign(self.arrays, tree_map_with_path(lambda name, array: fitting.get(name, array), self.arrays))

    def _read_callbacks(self, saved: Mapping[str, Any]) -> None:
        by_name = {callback.name: callback for callback in self.callbacks}
        for name, state in saved.items():
            if name in by_name:
                by_name[name].load_state_dict(state)
            else:
                logger.warning("the checkpoint holds the state of a callback %r which this run does not have", name)


@attrs.frozen(eq=False)
class TakenSnapshot:
    """What a checkpoint will hold."""

    module: TrainerModule
    optimizer: dict[str, mx.array]
    callbacks: dict[str, mx.array]
    random_key: mx.array
    identity: Identity
    contents: str
    """The rest as JSON, so that nothing in it can change."""

    @property
    def arrays(self) -> Any:
        """The arrays that `write` reads, as a tree."""
        own = self.module.model.trainable_parameters(), self.optimizer, self.callbacks, self.random_key
        return own, dict(self.identity.frozen_sums)

    def write(self, directory: Path) -> None:
        """Fill `directory`."""
        self.module.save(directory)
        check_finite(directory)
        with (directory / OPTIMIZER_FILE).open("wb") as file:
            mx.save_safetensors(file, self.optimizer)
        if self.callbacks:
            with (directory / CALLBACKS_FILE).open("wb") as file:
                mx.save_safetensors(file, self.callbacks)
        contents = {
            "format_version": FORMAT_VERSION,
            **json.loads(self.contents),
            "random_state": key_to_seed(self.random_key),
            **self.identity.as_dict(),
        }
        (directory / STATE_FILE).write_text(json.dumps(contents, indent=2) + "\n")


def verified(directory: Path) -> dict[str, Any]:
    """What the state file of a good checkpoint says; raises CheckpointError for a damaged one."""
    verify(directory)
    contents: dict[str, Any] = json.loads((directory / STATE_FILE).read_text())
    return contents


def fits(found: mx.array, expected: mx.array) -> bool:
    """Whether one can stand where the other does."""
    return found.shape == expected.shape and found.dtype == expected.dtype


def can_be_frozen(module: TrainerModule) -> bool:
    """Whether `save` is this package's own, which reads the trainable parameters and nothing else that may change."""
    own = module.save.__module__.startswith("mlx_trainer.")
    return own and any(value is module.model for value in vars(module).values())


def frozen_copy(module: TrainerModule) -> TrainerModule:
    """A module with the same arrays in containers of its own: it stays as it is while training fills the others."""
    frozen = copy.copy(module)
    models = {name: value for name, value in vars(module).items() if isinstance(value, nn.Module)}
    vars(frozen).update(own_containers(models))  # by whatever name: `model` may be a property
    return frozen


def own_containers(tree: Any) -> Any:
    """The same leaves in new modules, dicts, lists and tuples."""
    if isinstance(tree, nn.Module):
        new = tree.__class__.__new__(tree.__class__)  # several times faster than copy.copy
        vars(new).update(vars(tree))
        dict.update(new, {name: own_containers(value) for name, value in tree.items()})
        return new
    if isinstance(tree, dict):
        return {key: own_containers(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([own_containers(value) for value in tree])
    return tree


def copied_arrays(tree: Any) -> Any:
    """The same values in memory of their own.

    Needed on CUDA: to be read by the host, an array is moved to managed memory there, and its former place is freed
    under the kernels that may just be reading it (mlx 0.32, `Buffer::raw_ptr`).
    """
    return tree_map(lambda array: mx.where(True, array, array), tree)
