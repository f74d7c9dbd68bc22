"""adapter_config.json: mlx-lm's words for the adapters of a file, and beside them ours, which say all of it."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn
from attrs import asdict, frozen

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.last_layers import trained_blocks
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.models.lora import DoRALinear, adapted_layers, rank_of
from mlx_trainer.models.lora.layout import Layout, most
from mlx_trainer.models.lora.targets import blocks

TENSORS = "adapters.safetensors"
CONFIG = "adapter_config.json"


def adapter_config(model: nn.Module, base: str | None, lora: LoRAConfig | None = None) -> dict[str, Any]:
    """Return what mlx-lm needs to rebuild the adapted layers; `alpha` = scale * rank is for other programs.

    `lora` is the `LoRAConfig` that chose them, as far as it is theirs.
    """
    layers = adapted_layers(model)
    if not layers:
        return named(base) | {"fine_tune_type": "full", "num_layers": trained_blocks(model)}
    own = lora if lora is not None and describes(lora, layers) else description(layers)
    return low_rank_config(base, len(model.layers), Layout.of(layers), layer_keys(model, list(layers)), asdict(own))


def low_rank_config(
    base: str | None, num_layers: int, layout: Layout, keys: Sequence[str], lora: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration of adapters with this `layout` on `keys`; `lora` are the options of `LoRAConfig`."""
    parameters = {
        "rank": layout.rank,
        "scale": layout.scale,
        "dropout": lora["dropout"],
        "keys": keys,
        "alpha": layout.scale * layout.rank,
    }
    kind = "dora" if lora["use_dora"] else "lora"
    return named(base) | {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": parameters,
        "lora": lora,
    }


def named(base: str | None) -> dict[str, Any]:
    """Return how a configuration names its base model, nothing where it has no name."""
    return {} if base is None else {"model": base}


def describes(lora: LoRAConfig, layers: Mapping[str, Any]) -> bool:
    """Whether the adapted `layers` have the ranks and scales that `lora` gives them."""
    return all(
        lora.rank_of(path) == rank_of(layer) and math.isclose(lora.scale_of(path), layer.scale)
        for path, layer in layers.items()
    )


def description(layers: Mapping[str, Any]) -> LoRAConfig:
    """Return a configuration that gives the adapted `layers`, wherever they have their ranks and scales from."""
    ranks = {path: rank_of(layer) for path, layer in layers.items()}
    alphas = {path: float(layer.scale * ranks[path]) for path, layer in layers.items()}
    first = next(iter(layers.values()))
    return LoRAConfig(
        **ranks_and_alphas(ranks, alphas),
        dropout=round(1 - first.dropout._p_1, 12),
        target_modules=list(layers),
        use_dora=isinstance(first, DoRALinear),
        init_lora_weights="pissa" if "_start_a" in first else "default",
    )


def ranks_and_alphas(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the options of `LoRAConfig` that give each path its own: what most have, and patterns for the others."""
    rank, alpha = most(ranks.values()), most(alphas.values())
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": {re.escape(path): own for path, own in sorted(ranks.items()) if own != rank},
        "alpha_pattern": {re.escape(path): own for path, own in sorted(alphas.items()) if own != alpha},
    }


def layer_keys(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return `paths` as mlx-lm's keys: relative to a block (`self_attn.q_proj`) where each block has it, else whole."""
    prefixes, owners = blocks(model), dict[str, list[str]]()
    for path in paths:
        prefix = next((prefix for prefix in prefixes if path.startswith(prefix)), "")
        owners.setdefault(path.removeprefix(prefix), []).append(path)
    everywhere = {key for key, owned in owners.items() if len(owned) == len(prefixes) or owned == [key]}
    return sorted(key for owner, owned in owners.items() for key in ([owner] if owner in everywhere else owned))


@frozen
class Written:
    """What a file says about the adapters in it."""

    lora: LoRAConfig | None
    """Ours, for whichever layer; None where another program wrote the file."""
    layout: Layout | None
    """mlx-lm's, for all layers; None for fully trained weights."""

    @classmethod
    def read(cls, path: Path) -> "Written":
        """Of an adapter_config.json; raises ModelError where it cannot be understood."""
        try:
            config = read_json(path)
            lora, told = config.get("lora"), config.get("lora_parameters", {})
            layout = Layout(int(told["rank"]), float(told["scale"])) if "scale" in told else None
            return cls(None if lora is None else LoRAConfig(**lora), layout)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} cannot be read as an adapter's configuration: {error}.") from error

    def scale_of(self, path: str) -> float | None:
        """The scale of the adapter on the layer at `path`; None where nothing is said."""
        if self.lora is not None:
            return self.lora.scale_of(path)
        return None if self.layout is None else self.layout.scale


def lora_of(adapter: Path) -> LoRAConfig | None:
    """Return the configuration of an adapter in mlx-lm's layout, None for fully trained weights; raises ModelError."""
    path = adapter / CONFIG
    if not path.exists():
        raise ModelError(f"{path}: No such file or directory; an adapter is a folder with this file")
    try:
        written = read_json(path)
        if written.get("fine_tune_type") == "full":
            return None
        if "lora" in written:
            return LoRAConfig(**written["lora"])
        lora = written["lora_parameters"]
        return LoRAConfig(
            rank=lora["rank"],
            alpha=lora["scale"] * lora["rank"],
            dropout=lora.get("dropout", 0.0),
            target_modules=adapted_paths(adapter / TENSORS) or lora["keys"],
            use_dora=written.get("fine_tune_type") == "dora",
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is not the configuration of an mlx-lm adapter: {error}") from error


def adapted_paths(path: Path) -> list[str]:
    """Return the paths of the layers that have an adapter in a file; mlx-lm's keys alone do not say which blocks."""
    names = open_tensors(path) if path.is_file() else ()
    return sorted(name.removesuffix(".lora_a") for name in names if name.endswith(".lora_a"))
