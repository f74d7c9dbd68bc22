"""PEFT's two files: `lora_A.weight` (rank, in) is `a` transposed, `lora_B.weight` (out, rank) is `b` transposed."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from attrs import evolve

from mlx_trainer.config.patterns import LONGEST_PATH
from mlx_trainer.export.low_rank import Adapter, LowRank, alpha_of, evened, low_rank, tensors_of
from mlx_trainer.export.peft import names
from mlx_trainer.export.peft.config import PeftConfig, check_targeted, describe, read_config
from mlx_trainer.models.adapter_config import CONFIG
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import write_json
from mlx_trainer.models.loading import write_tensors
from mlx_trainer.models.lora.layout import most
from mlx_trainer.monitoring import visible

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
LEAVES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",  # before PEFT 0.10 and after, one or the other
}
EMBEDDINGS = ("embed_tokens",)
"""The last names of layers that look up instead of multiplying; PEFT calls their tensors otherwise."""

TENSOR = re.compile(
    rf"{re.escape(PREFIX)}(.{{1,{LONGEST_PATH}}})\.({'|'.join(map(re.escape, LEAVES))}|base_layer\.weight)"
)


def is_peft(directory: Path) -> bool:
    """Whether the adapter in `directory` is in PEFT's layout; the configuration has the same name in both."""
    return (directory / TENSORS).exists() or (directory / "adapter_model.bin").exists()


def read_peft(directory: Path) -> tuple[Adapter, dict[str, mx.array]]:
    """Return the adapter in `directory`, with mlx-lm's names, and the base weights that PEFT has put beside it.

    PEFT saves an adapted embedding whole; it can be carried only where it is the base's own. Raises ModelError.
    """
    if not (directory / TENSORS).exists() and (directory / "adapter_model.bin").exists():
        raise ModelError(
            f"{directory / 'adapter_model.bin'} is a pickle, which can run code and is not opened; "
            "save the adapter as safetensors (PEFT's default)."
        )
    config = read_config(directory)
    factors, weights = parts_of(tensors_of(directory / TENSORS), directory / TENSORS)
    check_targeted(config, factors)
    renamed = names.to_mlx(factors)
    layers = {renamed[layer]: layer_of(layer, parts, config) for layer, parts in factors.items()}
    base, dropout = config["base_model_name_or_path"], config["lora_dropout"] or 0.0
    adapter = Adapter(layers, base if isinstance(base, str) else None, float(dropout), bool(config["use_rslora"]))
    return adapter, {renamed.get(layer, layer): weight for layer, weight in weights.items()}


def parts_of(tensors: Mapping[str, mx.array], path: Path) -> tuple[dict[str, dict[str, mx.array]], dict[str, mx.array]]:
    """Return the factors by layer, transposed as mlx-lm has them, and saved base weights; raises ModelError."""
    factors: dict[str, dict[str, mx.array]] = {}
    weights = {}
    for name, value in sorted(tensors.items()):
        found = TENSOR.fullmatch(name)
        if found is None:
            raise ModelError(
                f"{path}: {visible(name):.200} belongs to no LoRA layer; only LoRA's tensors can be carried."
            )
        layer, leaf = found.groups()
        if leaf == "base_layer.weight":
            weights[layer] = value
        else:
            factors.setdefault(layer, {})[LEAVES[leaf]] = value.T if value.ndim == 2 else value
    if not factors:
        raise ModelError(f"{path} has no LoRA tensors.")
    return factors, weights


def layer_of(layer: str, parts: Mapping[str, mx.array], config: PeftConfig) -> LowRank:
    """Return the adapter of `layer`; raises ModelError where its tensors are not those of the configuration."""
    dora, rank = bool(config["use_dora"]), config.rank(layer)
    if dora and layer.rpartition(".")[2] in EMBEDDINGS:
        raise ModelError(
            f"{config.path} has DoRA on {layer}: mlx-lm computes another norm there, so it cannot be carried."
        )
    found = low_rank(layer, parts, config.scale(layer), dora=dora, path=config.path.with_name(TENSORS))
    if found.rank != rank:
        raise ModelError(f"{config.path} has rank {rank} for {layer}, its tensors have {found.rank}.")
    return found


def plain(adapter: Adapter) -> Adapter:
    """Return `adapter` with one rank and scale and without rsLoRA: the same function, also where no more is read."""
    return evolve(adapter, layers=evened(adapter.layers), use_rslora=False)


def write_peft(adapter: Adapter, directory: Path, known: Collection[str] | None = None) -> None:
    """Write `adapter` into an existing `directory`; `known` are the paths of all layers of the base.

    `lora_alpha` is a whole number, since other programs read it as one; what remains of it goes into lora_B.
    """
    layers = {names.to_transformers(path): layer for path, layer in adapter.layers.items()}
    others = None if known is None else {named for path in known if (named := name_or_none(path)) is not None}
    alphas = {path: max(1, round(alpha_of(layer, rslora=adapter.use_rslora))) for path, layer in layers.items()}
    tensors: dict[str, mx.array] = {}
    for path, layer in layers.items():
        dora_embedding = layer.m is not None and path.rpartition(".")[2] in EMBEDDINGS
        if dora_embedding:
            raise ModelError(
                f"{path} has DoRA on an embedding, of which PEFT computes another norm; it cannot be carried."
            )
        rest = alpha_of(layer, rslora=adapter.use_rslora) / alphas[path]
        tensors |= {f"{PREFIX}{path}.{leaf}": value for leaf, value in peft_tensors(path, layer, rest).items()}
    write_tensors(directory / TENSORS, tensors, layout="pt")
    config = peft_config(adapter, layers, alphas) | describe(layers, others)
    write_json(directory / CONFIG, dict(sorted(config.items())))


def name_or_none(path: str) -> str | None:
    """Return transformers' name of a layer, None where it has none that PEFT could target."""
    try:
        return names.to_transformers(path)
    except ModelError:
        return None


def peft_tensors(path: str, layer: LowRank, rest: float) -> dict[str, mx.array]:
    """Return the tensors of one layer under PEFT's names."""
    a, b = mx.contiguous(layer.a.T), mx.contiguous((layer.b * rest).T)
    if path.rpartition(".")[2] in EMBEDDINGS:
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    magnitude = {} if layer.m is None else {"lora_magnitude_vector": layer.m}
    return {"lora_A.weight": a, "lora_B.weight": b, **magnitude}


def peft_config(adapter: Adapter, layers: Mapping[str, LowRank], alphas: Mapping[str, int]) -> dict[str, Any]:
    """Return the configuration but for the targets; patterns name the layers that are not as most are."""
    rank = most(layer.rank for layer in layers.values())
    alpha = most(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "rank_pattern": {path: layer.rank for path, layer in sorted(layers.items()) if layer.rank != rank},
        "alpha_pattern": {path: value for path, value in sorted(alphas.items()) if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
