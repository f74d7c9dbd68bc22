"""Adapters on disk, in mlx-lm's layout: `mlx_lm.load(model, adapter_path=directory)` reads what is written here."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.adapter_config import CONFIG, TENSORS, Written, adapter_config, lora_of
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import write_json
from mlx_trainer.models.loading import open_tensors, write_tensors
from mlx_trainer.models.lora import adapted_layers, trainable
from mlx_trainer.models.lora.layout import Layout, inexact, packed, put_back, tensors_of, unpacked
from mlx_trainer.module import check_parameters
from mlx_trainer.monitoring import visible

EXACT = "unscaled.safetensors"
"""Each `lora_b` whose scale is not a power of two times the file's, as it was: for an exact continuation."""

__all__ = ["adapter_config", "load_adapters", "lora_of", "save_adapters"]


def save_adapters(
    model: nn.Module, directory: Path, *, base: str | None = None, lora: LoRAConfig | None = None
) -> None:
    """Write the trainable parameters of `model` and how to read them into `directory`; raises OSError.

    After full fine-tuning these are all weights (mlx-lm's `fine_tune_type` "full"). `base` is the base model's name,
    `lora` the configuration of the adapters, which otherwise is told from the layers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    layers = adapted_layers(model)
    tensors = trainable(model)
    if layers:
        layout = Layout.of(layers)
        tensors |= dotted({path: packed(layer, layout) for path, layer in layers.items()})
        if exact := inexact(layers, layout):
            write_tensors(directory / EXACT, exact)
    write_tensors(directory / TENSORS, tensors)
    write_json(directory / CONFIG, adapter_config(model, base, lora))


def dotted(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What layers have by name, by the layer's path and the name."""
    return {f"{path}.{name}": value for path, own in layers.items() for name, value in own.items()}


def load_adapters(model: nn.Module, directory: Path) -> None:
    """Read what `save_adapters` or mlx-lm wrote into the trainable parameters of `model`, which has its adapters.

    Raises ModelError, and changes nothing, where names, shapes, types, or the adapters' scales differ, or where a
    value is not finite.
    """
    path = directory / TENSORS
    if not path.is_file():
        raise ModelError(f"{directory} holds no adapter: {TENSORS} is missing.")
    layers, written = adapted_layers(model), Written.read(directory / CONFIG)
    check_scale(layers, written, directory / CONFIG)
    loaded = open_tensors(path)
    check_finite(loaded, path)
    expected = trainable(model) | dotted({name: tensors_of(layer) for name, layer in layers.items()})
    if written.lora is not None and written.layout is not None:  # another program's are of one rank and scale
        loaded |= read_back(layers, written.layout, loaded, directory / EXACT)
    try:
        check_parameters(expected, loaded, str(path))
    except ValueError as error:
        raise ModelError(f"{visible(str(error)):.1000}") from error
    check_dtypes(expected, loaded, path)
    values = {name: value.astype(expected[name].dtype) for name, value in loaded.items()}
    mx.eval(values)  # mx.load is lazy: read now, before the file may change
    for name, layer in layers.items():
        put_back(layer, {last: values.pop(f"{name}.{last}") for last in tensors_of(layer)})
    model.update(tree_unflatten(list(values.items())))


def read_back(
    layers: Mapping[str, Any], layout: Layout, loaded: Mapping[str, mx.array], exact: Path
) -> dict[str, mx.array]:
    """Return the tensors of `layers` among the `loaded` ones, each with its own rank and scale again."""
    beside = open_tensors(exact) if exact.is_file() else {}
    found: dict[str, dict[str, mx.array]] = {path: {} for path in layers}
    for name, value in loaded.items():
        path, _, last = name.rpartition(".")
        found.get(path, {})[last] = value
    return dotted(
        {path: unpacked(layers[path], own, layout, beside.get(f"{path}.lora_b")) for path, own in found.items()}
    )


def check_scale(layers: Mapping[str, Any], written: Written, path: Path) -> None:
    """Raise ModelError where the adapters were trained with another scale: they would fit, and compute otherwise."""
    for name, layer in layers.items():
        scale = written.scale_of(name)
        if scale is not None and not math.isclose(scale, layer.scale, rel_tol=1e-6):
            raise ModelError(
                f"{path} has scale {scale}, but {name} has {layer.scale}; set lora.alpha, or what else scales it, so."
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
