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


def write(
    directory: Path,
    module: TrainerModule,
    optimizer: optimizers.Optimizer,
    state: TrainingState,
    callbacks: Sequence[Callback],
    loader: Loader,
) -> None:
    """Fill `directory` with the run as it stands between two steps."""
    module.save(directory)
    arrays = dict(tree_flatten(optimizer.state))
    with (directory / OPTIMIZER_FILE).open("wb") as file:
        mx.save_safetensors(file, arrays)
    contents = {
        "format_version": FORMAT_VERSION,
        **attrs.asdict(state),
        "random_state": random_state(),
        "loader": loader.state_dict() if isinstance(loader, ResumableLoader) else None,
        "callbacks": {callback.name: saved for callback in callbacks if (saved := callback.state_dict())},
        "versions": {"mlx": version("mlx"), "mlx_trainer": __version__},
    }
    (directory / STATE_FILE).write_text(json.dumps(contents, indent=2) + "\n")


def read(
    directory: Path,
    module: TrainerModule,
    optimizer: optimizers.Optimizer,
    state: TrainingState,
    callbacks: Sequence[Callback],
    loader: Loader,
) -> None:
    """Put everything back; the run continues bit for bit. Raises CheckpointError where anything does not fit."""
    verify(directory)
    contents = json.loads((directory / STATE_FILE).read_text())
    try:
        module.load(directory)
        _read_optimizer(directory / OPTIMIZER_FILE, optimizer, module)
    except ValueError as error:
        raise CheckpointError(f"cannot resume from {directory}: {error}") from error
    for field in attrs.fields(TrainingState):
        setattr(state, field.name, contents[field.name])
    _read_callbacks(contents["callbacks"], callbacks)
    if isinstance(loader, ResumableLoader) and contents["loader"] is not None:
        loader.load_state_dict(contents["loader"])
    restore_random_state(contents["random_state"])


def _read_optimizer(path: Path, optimizer: optimizers.Optimizer, module: TrainerModule) -> None:
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    check_parameters(dict(tree_flatten(optimizer.state)), loaded, str(path))
    mx.eval(loaded)  # mx.load is lazy: read now, before the file may change
    optimizer.state = tree_unflatten(list(loaded.items()))
    optimizer.init(module.model.trainable_parameters())


def _read_callbacks(saved: Mapping[str, Any], callbacks: Sequence[Callback]) -> None:
    by_name = {callback.name: callback for callback in callbacks}
    for name, state in saved.items():
        if name in by_name:
            by_name[name].load_state_dict(state)
        else:
            logger.warning("the checkpoint holds the state of a callback %r which this run does not have", name)
