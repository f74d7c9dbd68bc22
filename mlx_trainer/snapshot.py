"""What a checkpoint holds beside the module's own files: optimizer state, position, randomness, callbacks."""

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_trainer import __version__
from mlx_trainer.callback import Callback
from mlx_trainer.checkpoint import FORMAT_VERSION, CheckpointError, verify
from mlx_trainer.loaders import Loader, ResumableLoader
from mlx_trainer.module import TrainerModule, check_parameters
from mlx_trainer.state import TrainingState, random_state, restore_random_state

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
        self.module.save(directory)
        with (directory / OPTIMIZER_FILE).open("wb") as file:
            mx.save_safetensors(file, dict(tree_flatten(self.optimizer.state)))
        contents = {
            "format_version": FORMAT_VERSION,
            **attrs.asdict(self.state),
            "random_state": random_state(),
            "loader": self.loader.state_dict() if isinstance(self.loader, ResumableLoader) else None,
            "callbacks": {callback.name: saved for callback in self.callbacks if (saved := callback.state_dict())},
            "versions": {"mlx": version("mlx"), "mlx_trainer": __version__},
        }
        (directory / STATE_FILE).write_text(json.dumps(contents, indent=2) + "\n")

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
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        check_parameters(dict(tree_flatten(self.optimizer.state)), loaded, str(path))
        mx.eval(loaded)  # mx.load is lazy: read now, before the file may change
        self.optimizer.state = tree_unflatten(list(loaded.items()))
        self.optimizer.init(self.module.model.trainable_parameters())

    def _read_callbacks(self, saved: Mapping[str, Any]) -> None:
        by_name = {callback.name: callback for callback in self.callbacks}
        for name, state in saved.items():
            if name in by_name:
                by_name[name].load_state_dict(state)
            else:
                logger.warning("the checkpoint holds the state of a callback %r which this run does not have", name)
