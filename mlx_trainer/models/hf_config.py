"""Hugging Face's config.json: reading it, and bringing it into the form that mlx-lm understands."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mlx_trainer.models.error import ModelError
from mlx_trainer.safetensors_file import check_regular

ModelSettings = dict[str, Any]
MAX_JSON_BYTES = 64 << 20
"""An index of 400,000 tensors; a configuration has a few kB."""


def read_json(path: Path) -> Any:
    """Return the JSON value in `path`; raises ModelError for what is no regular file, too long, too deep or no JSON."""
    try:
        check_regular(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelError(f"{path} cannot be read as JSON: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error!s:.200}.") from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object for people to read; raises OSError."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_config(directory: Path) -> ModelSettings:
    """Return config.json of `directory`; raises ModelError where it is missing, broken or names no model type."""
    path = directory / "config.json"
    if not path.exists():
        adapters = (directory / "adapter_config.json").exists()
        hint = "it holds adapters: give their base model" if adapters else found(directory)
        raise ModelError(f"{directory} has no config.json, so it is no model folder; {hint}.")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f'{path} names no "model_type" (such as "mistral").')
    return config


def window_of(settings: Mapping[str, Any]) -> int | None:
    """Return how many positions back a sliding layer looks, None where none slides (`use_sliding_window` false)."""
    inner = settings.get("text_config")
    text = inner if isinstance(inner, Mapping) else settings
    window = text.get("sliding_window")
    return window if isinstance(window, int) and text.get("use_sliding_window", True) else None


def vocabulary_size(settings: Mapping[str, Any]) -> int | None:
    """Return how many token ids the model has, None where its configuration does not say."""
    inner = settings.get("text_config")
    size = settings.get("vocab_size", inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    return size if isinstance(size, int) else None


def found(directory: Path) -> str:
    """Return a few of the names in `directory`, for an error's text."""
    names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"it holds {', '.join(names[:5])}{more}" if names else "it is empty"


def normalised(config: Mapping[str, Any], tensors: Collection[str]) -> ModelSettings:
    """Return a copy of `config` that mlx-lm reads as transformers would; a key that stands there already wins.

    mlx-lm ties the head to the embedding where the key is absent; whether `tensors` hold a head decides that here.
    """
    settings: ModelSettings = {
        "tie_word_embeddings": not any(f".{name}".endswith(".lm_head.weight") for name in tensors)
    }
    settings |= expert_keys(config) | layer_keys(config) | rope_keys(config)
    settings |= {key: value for key, value in config.items() if key != "rope_scaling" or value}
    if isinstance(inner := config.get("text_config"), Mapping):  # of a model of texts and pictures, which ties above
        inner = {key: value for key, value in inner.items() if key != "tie_word_embeddings"}
        settings = {"vocab_size": vocabulary_size(config), **settings, "text_config": normalised(inner, tensors)}
    return settings


def rope_keys(config: Mapping[str, Any]) -> ModelSettings:
    """Return what `rope_parameters` says under the names of transformers 4, which mlx-lm reads.

    transformers 5 writes the rope under that key alone, for some models in one table per kind of layer; mlx-lm would
    then take its own defaults, such as a base of 10000.
    """
    table = config.get("rope_parameters")
    if not isinstance(table, Mapping):
        return {}
    rope, keys = table, {}
    if isinstance(table.get("full_attention"), Mapping):
        rope = table["full_attention"]
        keys["rope_local_base_freq"] = (table.get("sliding_attention") or rope).get("rope_theta")
    keys |= {"rope_theta": rope.get("rope_theta"), "rotary_emb_base": rope.get("rope_theta")}
    keys |= dict.fromkeys(("partial_rotary_factor", "rotary_pct"), rope.get("partial_rotary_factor"))
    if (kind := rope.get("rope_type", "default")) != "default":
        keys["rope_scaling"] = {"type": kind, **{key: value for key, value in rope.items() if key != "rope_theta"}}
    return {key: value for key, value in keys.items() if value is not None}


def layer_keys(config: Mapping[str, Any]) -> ModelSettings:
    """Return the number that some of mlx-lm's classes take for `layer_types`: of so many layers the last sees all."""
    kinds = config.get("layer_types") or []
    return {"sliding_window_pattern": kinds.index("full_attention") + 1} if "full_attention" in kinds else {}


def expert_keys(config: Mapping[str, Any]) -> ModelSettings:
    """Return the number of experts under the name of transformers 4."""
    return {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
