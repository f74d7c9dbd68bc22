"""mlx-lm's layout of an adapter: read and written without its base model, and opened on it by mlx-lm itself."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.export.low_rank import (
    LEAVES,
    Adapter,
    LowRank,
    alpha_of,
    block_of,
    evened,
    low_rank,
    number,
    tensors_of,
    trimmed,
)
from mlx_trainer.models.adapter_config import CONFIG, TENSORS, low_rank_config, ranks_and_alphas
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_json, write_json
from mlx_trainer.models.libraries import quiet_imports
from mlx_trainer.models.loading import write_tensors
from mlx_trainer.models.lora.layout import Layout
from mlx_trainer.monitoring import visible


def read_mlx(directory: Path, *, merging: bool = False) -> Adapter:
    """Return the adapter in `directory`, as mlx-lm or a training here wrote it; raises ModelError, naming the file.

    What nothing but a merged model can hold, such as layers of experts, is refused unless it is for merging.
    """
    path = directory / CONFIG
    try:
        config = read_json(path)
        kind, base = config.get("fine_tune_type", "lora"), base_name(config)
        parameters, own = config.get("lora_parameters", {}), config.get("lora", {})
        scale, dropout = number(parameters.get("scale")), number(parameters.get("dropout", 0.0))
        rslora = own.get("use_rslora", False) is True
    except AttributeError as error:
        raise ModelError(f"{path} is not the configuration of an mlx-lm adapter: {error!s:.200}.") from error
    if kind == "full":
        raise ModelError(f"{directory} holds all weights of a model, not an adapter: it is a model to be saved whole.")
    if not scale or dropout is None or kind not in ("lora", "dora"):
        raise ModelError(
            f"{path} is not the configuration of an mlx-lm adapter: its lora_parameters need a scale that is not 0, "
            f"its fine_tune_type is lora or dora; there are {parameters.get('scale')!r:.50} and {kind!r:.50}."
        )
    file, dora = directory / TENSORS, kind == "dora"
    layers = {
        name: trimmed(low_rank(name, parts, scale, dora=dora, path=file, merging=merging))
        for name, parts in grouped(tensors_of(file), file).items()
    }
    return Adapter(layers, base, dropout, rslora, directory)


def base_name(config: Mapping[str, Any]) -> str | None:
    """Return how an adapter's configuration names its base model, None where it does not."""
    base = config.get("model")
    return base if isinstance(base, str) else None


def opened_by_mlx_lm(model: nn.Module, directory: Path) -> nn.Module:
    """Return `model` with the adapter in `directory`, put there by mlx-lm's own code; raises ModelError."""
    with quiet_imports():
        from mlx_lm.tuner.utils import load_adapters
    try:
        opened: nn.Module = load_adapters(model, str(directory))
    except (ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"mlx-lm cannot put the adapter in {directory} on its base model: {reason:.400}") from error
    return opened


def grouped(tensors: Mapping[str, mx.array], path: Path) -> dict[str, dict[str, mx.array]]:
    """Return `tensors` by layer and leaf; raises ModelError for one that is no part of an adapter."""
    layers: dict[str, dict[str, mx.array]] = {}
    for name, value in sorted(tensors.items()):
        layer, _, leaf = name.rpartition(".")
        if leaf not in LEAVES or not layer:
            raise ModelError(
                f"{path}: {visible(name):.200} belongs to no adapter; its tensors end in {', '.join(LEAVES)}."
            )
        layers.setdefault(layer, {})[leaf] = value
    if not layers:
        raise ModelError(f"{path} has no tensors.")
    return layers


def write_mlx(adapter: Adapter, directory: Path, known: Collection[str] | None = None) -> None:
    """Write `adapter` into an existing `directory` as mlx-lm reads it; `known` are the paths of all layers of the base.

    mlx-lm has one rank and one scale for all layers. Those that they have stand beside them under "lora", from where a
    training here takes them.
    """
    layers = evened(adapter.layers)
    first = next(iter(layers.values()))
    write_tensors(directory / TENSORS, mlx_tensors(layers))
    num_layers = max((block_of(path)[1] or 0 for path in known or layers), default=0) + 1
    layout, keys = Layout(first.rank, first.scale), mlx_keys(layers, known)
    write_json(directory / CONFIG, low_rank_config(adapter.base, num_layers, layout, keys, description(adapter)))


def mlx_tensors(layers: Mapping[str, LowRank]) -> dict[str, mx.array]:
    """Return the tensors of `layers` by mlx-lm's names."""
    parts = {path: {"lora_a": layer.a, "lora_b": layer.b, "m": layer.m} for path, layer in layers.items()}
    return {f"{path}.{leaf}": value for path, own in parts.items() for leaf, value in own.items() if value is not None}


def mlx_keys(layers: Collection[str], known: Collection[str] | None) -> list[str]:
    """Return mlx-lm's keys for `layers`: as within a block where each has it adapted, else whole paths."""

    def inside(path: str) -> str:
        return re.sub(r"^.*?\.\d+\.", "", path)

    partly = {inside(path) for path in known if path not in layers} if known is not None else None
    return sorted({path if partly is None or inside(path) in partly else inside(path) for path in layers})


def description(adapter: Adapter) -> dict[str, Any]:
    """Return the options of `LoRAConfig` that give such layers."""
    ranks = {path: layer.rank for path, layer in adapter.layers.items()}
    alphas = {path: alpha_of(layer, rslora=adapter.use_rslora) for path, layer in adapter.layers.items()}
    return {
        **ranks_and_alphas(ranks, alphas),
        "dropout": adapter.dropout,
        "target_modules": sorted(adapter.layers),
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
    }
