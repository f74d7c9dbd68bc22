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
    """Return a copy of `config` that mlx-lm reads as transformers would.

    transformers 5 writes the rope base under `rope_parameters` alone, and mlx-lm would then take 10000. mlx-lm ties
    the head to the embedding where the key is absent; whether `tensors` hold a head decides that here.
    """
    settings = dict(config)
    rope = settings.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope:  # else none, or one table per kind of layer: mlx-lm's own
        settings.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            settings["rope_scaling"] = settings.get("rope_scaling") or scaling
    settings.setdefault("tie_word_embeddings", "lm_head.weight" not in tensors)
    return settings
