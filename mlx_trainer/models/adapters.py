"""Adapters on disk, in mlx-lm's layout: `mlx_lm.load(model, adapter_path=directory)` reads what is written here."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.models.lora import adapted_layers, trainable
from mlx_trainer.module import check_parameters
from mlx_trainer.monitoring import visible

TENSORS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def save_adapters(model: nn.Module, directory: Path, *, base: str | None = None) -> None:
    """Write the trainable parameters of `model` and how to read them into `directory`; raises OSError.

    After full fine-tuning these are all weights (mlx-lm's `fine_tune_type` "full"). `base` is the base model's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Through a file object: a full disk is then an OSError with its number, not a bare RuntimeError.
    with (directory / TENSORS).open("wb") as file:
        mx.save_safetensors(file, trainable(model), metadata={"format": "mlx"})
    text = json.dumps(adapter_config(model, base), indent=2)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")


def adapter_config(model: nn.Module, base: str | None) -> dict[str, Any]:
    """Return what mlx-lm needs to rebuild the adapted layers; `alpha` = scale * rank is for other programs."""
    blocks = len(model.layers)
    named = {} if base is None else {"model": base}
    layers = adapted_layers(model)
    if not layers:
        return {**named, "fine_tune_type": "full", "num_layers": blocks}
    first = next(iter(layers.values()))
    rank = first.lora_a.shape[1]
    parameters = {
        "rank": rank,
        "scale": first.scale,
        "dropout": round(1 - first.dropout._p_1, 12),
        "keys": layer_keys(model, list(layers)),
        "alpha": first.scale * rank,
    }
    return {**named, "fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": parameters}


def layer_keys(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return `paths` as mlx-lm's keys: relative to a block (`self_attn.q_proj`) where each block has it, else whole."""
    blocks = {id(block) for block in model.layers}
    prefixes = [path for path, module in model.named_modules() if id(module) in blocks]
    owners: dict[str, list[str]] = {}
    for path in paths:
        prefix = next((prefix for prefix in prefixes if path.startswith(f"{prefix}.")), None)
        owners.setdefault(path if prefix is None else path.removeprefix(f"{prefix}."), []).append(path)
    everywhere = {key for key, owned in owners.items() if len(owned) == len(prefixes) or owned == [key]}
    return sorted(key for owner, owned in owners.items() for key in ([owner] if owner in everywhere else owned))


def load_adapters(model: nn.Module, directory: Path) -> None:
    """Read what `save_adapters` wrote into the trainable parameters of `model`, which has its adapters already.

    Raises ModelError, and changes nothing, where names, shapes, types, or the adapters' scale differ, or where a
    value is not finite.
    """
    path = directory / TENSORS
    if not path.is_file():
        raise ModelError(f"{directory} holds no adapter: {TENSORS} is missing.")
    check_scale(model, directory / CONFIG)
    expected, loaded = trainable(model), open_tensors(path)
    try:
        check_parameters(expected, loaded, str(path))
    except ValueError as error:
        raise ModelError(f"{visible(str(error)):.1000}") from error
    check_dtypes(expected, loaded, path)
    check_finite(loaded, path)
    values = {name: value.astype(expected[name].dtype) for name, value in loaded.items()}
    mx.eval(values)  # mx.load is lazy: read now, before the file may change
    model.update(tree_unflatten(list(values.items())))


def check_scale(model: nn.Module, path: Path) -> None:
    """Raise ModelError where the adapters were trained with another scale: they would fit, and compute otherwise."""
    try:
        written = read_json(path).get("lora_parameters", {}).get("scale")
        written = None if written is None else float(written)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as an adapter's configuration: {error}.") from error
    for name, layer in adapted_layers(model).items():
        if written is not None and not math.isclose(written, layer.scale, rel_tol=1e-6):
            raise ModelError(
                f"{path} has scale {written}, but {name} has alpha / rank = {layer.scale}; set lora.alpha so."
            )


def check_dtypes(expected: Mapping[str, mx.array], found: Mapping[str, mx.array], path: Path) -> None:
    """Raise ModelError where a tensor's type is not the model's, nor a shorter float that it can take without loss."""
    wrong = [
        f"{name} is {found[name].dtype}, the model's is {value.dtype}"
        for name, value in expected.items()
        if mx.result_type(found[name].dtype, value.dtype) != value.dtype
        or not mx.issubdtype(found[name].dtype, mx.floating)
    ]
    if wrong:
        raise ModelError(
            f"{path} has tensors of another type ({len(wrong)} in all): {'; '.join(wrong[:5])}. "
            "Load the base model with the dtype it was trained in."
        )


def check_finite(tensors: Mapping[str, mx.array], path: Path) -> None:
    """Raise ModelError naming the tensors that hold NaN or infinity, or where the file is too short to be read."""
    try:
        finite = {name: bool(mx.isfinite(value).all().item()) for name, value in tensors.items()}
    except RuntimeError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    if wrong := [name for name, good in finite.items() if not good]:
        raise ModelError(f"{path} holds NaN or infinity in {', '.join(wrong[:5])} ({len(wrong)} tensors).")
