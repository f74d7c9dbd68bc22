"""What a checkpoint holds beside the module's own files: optimizer state, position, randomness, callbacks."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_trainer import __version__
from mlx_trainer.callback import Callback
from mlx_trainer.checkpoint import FORMAT_VERSION, CheckpointError, verify
from mlx_trainer.compressed import load_tensors
from mlx_trainer.finite import check_finite
from mlx_trainer.loaders import Loader, ResumableLoader
from mlx_trainer.module import TrainerModule, check_parameters
from mlx_trainer.state import TrainingState, key_to_seed, random_key, restore_random_state

logger = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


@attrs.frozen
class Snapshot:
    """The living parts of a run, which a checkpoint holds."""

    module: TrainerModule
    optimizer: optimizers.Optimizer
    state: TrainingState
    callbacks: Sequence[Callback]
    loader: Loader

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
            "loader": self.loader.state_dict() if isinstance(self.loader, ResumableLoader) else None,
            "callbacks": {callback.name: saved for callback in self.callbacks if (saved := callback.state_dict())},
        }
        module, optimizer = self.module, dict(tree_flatten(self.optimizer.state))
        if frozen:
            module = frozen_copy(module)
        if frozen and mx.cuda.is_available():
            module.model.update(copied_arrays(module.model.trainable_parameters()))
            optimizer = copied_arrays(optimizer)
        return TakenSnapshot(module, optimizer, random_key(), json.dumps(contents))

    def read(self, directory: Path) -> None:
        """Put everything back; the run continues bit for bit. Raises CheckpointError where anything does not fit."""
        verify(directory)
        contents = json.loads((directory / STATE_FILE).read_text())
        try:
            self.module.load(directory)
            self._read_optimizer(directory / OPTIMIZER_FILE)
        except ValueError as error:
            raise CheckpointError(f"cannot resume from {directory}: {error}") from error
        for field in attrs.fields(TrainingState):
            setattr(self.state, field.name, contents[field.name])
        self._read_callbacks(contents["callbacks"])
        if isinstance(self.loader, ResumableLoader) and contents["loader"] is not None:
            self.loader.load_state_dict(contents["loader"])
        restore_random_state(contents["random_state"])

    def _read_optimizer(self, path: Path) -> None:
        fresh = dict(tree_flatten(self.optimizer.state))
        loaded = load_tensors(path, most_bytes=2 * sum(array.nbytes for array in fresh.values()) + (1 << 24))
        check_parameters(fresh, loaded, str(path))
        self.optimizer.state = tree_unflatten(list(loaded.items()))
        self.optimizer.init(self.module.model.trainable_parameters())

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
    random_key: mx.array
    contents: str
    """The rest as JSON, so that nothing in it can change."""

    @property
    def arrays(self) -> Any:
        """The arrays that `write` reads, as a tree."""
        return self.module.model.trainable_parameters(), self.optimizer, self.random_key

    def write(self, directory: Path) -> None:
        """Fill `directory`."""
        self.module.save(directory)
        check_finite(directory)
        with (directory / OPTIMIZER_FILE).open("wb") as file:
            mx.save_safetensors(file, self.optimizer)
        contents = {
            "format_version": FORMAT_VERSION,
            **json.loads(self.contents),
            "random_state": key_to_seed(self.random_key),
            "versions": {"mlx": version("mlx"), "mlx_trainer": __version__},
        }
        (directory / STATE_FILE).write_text(json.dumps(contents, indent=2) + "\n")


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
