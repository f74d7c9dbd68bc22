"""Adapters for tests, all of them random, so that each of their numbers matters."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import inject_lora, load_model, save_adapters
from mlx_trainer.models.lora import trainable


def write_adapter(base: Path, folder: Path, lora: LoRAConfig, *, seed: int = 0, named: str | None = None) -> Path:
    """Write an adapter of `base` into `folder` in mlx-lm's layout; it names `base`, or what is `named`."""
    model = inject_lora(load_model(base, dtype="float32"), lora)
    generator, shapes = np.random.default_rng(seed), trainable(model)
    drawn = {name: mx.array(generator.normal(0, 0.1, shapes[name].shape).astype(np.float32)) for name in sorted(shapes)}
    model.load_weights(list(drawn.items()), strict=False)
    save_adapters(model, folder, base=str(base) if named is None else named)
    return folder


def tensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, in memory."""
    found = dict(mx.load(str(path)))
    mx.eval(found)
    return found


def rewrite(path: Path, **changes: mx.array | None) -> None:
    """Replace tensors of a file; None removes one. `__` in a name stands for a dot."""
    changed = tensors(path) | {name.replace("__", "."): value for name, value in changes.items()}
    mx.save_safetensors(str(path), {name: value for name, value in changed.items() if value is not None})


def reconfigure(folder: Path, **changes: Any) -> None:
    """Replace options in a folder's adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's adapter_config.json."""
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found
