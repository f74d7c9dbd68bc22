"""An adapter as what it computes, whatever its layout on disk; and mlx-lm's layout, read and written.

Each layer has `y = W x + scale · (x a) b`; DoRA (https://arxiv.org/abs/2402.09353) has `m / ‖W + scale · (a b)ᵀ‖` times
that, the norm being one of each output; a bias stays outside.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import evolve, frozen

from mlx_trainer.models.adapters import CONFIG, TENSORS, check_finite, layer_keys
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.monitoring import visible

LEAVES = ("lora_a", "lora_b", "m")


@frozen
class LowRank:
    """One layer's adapter: `a` (in, rank), `b` (rank, out), DoRA's magnitudes `m` (out,) or None; all float32.

    Of an embedding `a` is (vocabulary, rank).
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return int(self.a.shape[1])


@frozen
class Adapter:
    """The adapted layers by their path in mlx-lm's model, and what both layouts say about them."""

    layers: Mapping[str, LowRank]
    base: str | None
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def use_dora(self) -> bool:
        """Whether the layers have magnitudes; all of them have, or none."""
        return any(layer.m is not None for layer in self.layers.values())


def read_mlx(directory: Path) -> Adapter:
    """Return the adapter in `directory`, as mlx-lm or a training here wrote it; raises ModelError, naming the file."""
    path = directory / CONFIG
    config = read_json(path)
    try:
        kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters", {})
        if kind == "full":
            raise ModelError(
                f"{directory} holds all weights of a model, not an adapter: it is a model to be saved whole."
            )
        scale, dropout = float(parameters["scale"]), float(parameters.get("dropout", 0.0))
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not the configuration of an mlx-lm adapter: {error!s:.200}.") from error
    if scale == 0 or not math.isfinite(scale) or kind not in ("lora", "dora"):
        raise ModelError(f"{path} has scale {scale} and fine_tune_type {kind!r}; wanted: not 0, and lora or dora.")
    factors = grouped(tensors_of(directory / TENSORS), directory / TENSORS)
    layers = {name: low_rank(name, parts, scale, dora=kind == "dora") for name, parts in factors.items()}
    return Adapter(layers, config.get("model"), dropout, bool(parameters.get("use_rslora", False)))


def tensors_of(path: Path) -> dict[str, mx.array]:
    """Return the tensors of `path` in float32 and in memory; raises ModelError for any but finite floats."""
    if not path.is_file():
        raise ModelError(f"{path.parent} holds no adapter: {path.name} is missing.")
    tensors = open_tensors(path)
    if wrong := [name for name, value in tensors.items() if not mx.issubdtype(value.dtype, mx.floating)]:
        raise ModelError(f"{path} has {visible(wrong[0]):.200} as {tensors[wrong[0]].dtype}, which is no float.")
    check_finite(tensors, path)
    whole = {name: value.astype(mx.float32) for name, value in tensors.items()}
    mx.eval(whole)  # mx.load is lazy: read now, before the file may change
    return whole


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


def low_rank(name: str, parts: Mapping[str, mx.array], scale: float, *, dora: bool) -> LowRank:
    """Return the adapter of layer `name` from its `parts`; raises ModelError where one lacks or does not fit."""
    wanted = LEAVES if dora else LEAVES[:2]
    if set(parts) != set(wanted):
        raise ModelError(f"{visible(name):.200} has {', '.join(sorted(parts))}; needed are {', '.join(wanted)}.")
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    if a.ndim == 3:
        raise ModelError(
            f"{visible(name):.200} is a layer of experts, which PEFT has no LoRA layout for; merge it instead."
        )
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] > 0 and (m is None or m.shape == (b.shape[1],))
    if not fits:
        shapes = ", ".join(f"{leaf} {tuple(value.shape)}" for leaf, value in parts.items())
        raise ModelError(f"{visible(name):.200} has {shapes}, which do not fit each other.")
    return LowRank(a, b, scale, m)


def trimmed(layer: LowRank) -> LowRank:
    """Return `layer` without the zeros at its end that several ranks are padded with; one rank at least stays."""
    used = (layer.a != 0).any(axis=0) | (layer.b != 0).any(axis=1)
    rank = max(int(mx.max(used * mx.arange(1, layer.rank + 1))), 1)
    return evolve(layer, a=layer.a[:, :rank], b=layer.b[:rank])


def write_mlx(adapter: Adapter, directory: Path, model: nn.Module | None = None) -> None:
    """Write `adapter` into an existing `directory` as mlx-lm reads it; with the base `model`, keys are short.

    mlx-lm has one rank and one scale for all layers: smaller ranks are padded with zeros, other scales go into lora_b.
    """
    layers, rank = adapter.layers, max(layer.rank for layer in adapter.layers.values())
    scale = next(iter(layers.values())).scale
    tensors = {}
    for path, layer in layers.items():
        more = rank - layer.rank
        tensors[f"{path}.lora_a"] = mx.pad(layer.a, [(0, 0), (0, more)])
        tensors[f"{path}.lora_b"] = mx.pad(layer.b * (layer.scale / scale), [(0, more), (0, 0)])
        if layer.m is not None:
            tensors[f"{path}.m"] = layer.m
    with (directory / TENSORS).open("wb") as file:
        mx.save_safetensors(file, tensors, metadata={"format": "mlx"})
    parameters = {
        "rank": rank,
        "scale": scale,
        "dropout": adapter.dropout,
        "keys": sorted(layers) if model is None else layer_keys(model, sorted(layers)),
        "alpha": scale * rank,
    }
    config: dict[str, Any] = {} if adapter.base is None else {"model": adapter.base}
    config |= {
        "fine_tune_type": "dora" if adapter.use_dora else "lora",
        "num_layers": blocks_of(adapter) if model is None else len(model.layers),
        "lora_parameters": parameters,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def blocks_of(adapter: Adapter) -> int:
    """Return how many blocks the base has at least, from the numbers in the layers' paths."""
    numbers = [int(part) for path in adapter.layers for part in path.split(".") if part.isdecimal()]
    return max(numbers, default=0) + 1
