"""Adapters with random values in mlx-lm's layout, so that each of their tensors matters."""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_trainer.models.loading import load_model

ROWS = [[1, 17, 300, 45, 9, 211], [1, 5, 6, 350, 2]]


def tensors_of(directory: Path) -> dict[str, mx.array]:
    """All tensors of the safetensors files in a folder, read."""
    found = {name: value for path in directory.glob("*.safetensors") for name, value in mx.load(str(path)).items()}
    mx.eval(found)
    return found


def random_adapter(
    base: Path,
    directory: Path,
    targets: Sequence[str] = ("self_attn.q_proj", "mlp.down_proj"),
    *,
    rank: int = 4,
    scale: float = 1.5,
    size: float = 0.1,
    seed: int = 0,
    dora: bool = False,
) -> Path:
    """Write an adapter on the `targets`, which are mlx-lm's keys, of the model in `base`, and return its folder.

    mlx-lm's own layers say which tensors there are and of which shape.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = load_model(base, dtype="float32")
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(targets)}
    linear_to_lora_layers(model, len(model.layers), parameters, use_dora=dora)
    generator = np.random.default_rng(seed)
    names = [
        name for name, _ in tree_flatten(model.parameters()) if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    ]
    values = dict(tree_flatten(model.parameters()))
    tensors = {
        name: values[name] * (1 + mx.array(generator.normal(0, size, values[name].shape), mx.float32))
        if name.endswith(".m")
        else mx.array(generator.normal(0, size, values[name].shape), mx.float32)
        for name in sorted(names)
    }
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
    config = {
        "model": str(base),
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": len(model.layers),
        "lora_parameters": parameters,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
