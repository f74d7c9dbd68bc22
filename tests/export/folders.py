"""Folders to be handed over, written in milliseconds: a run with its adapter, a PEFT export."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_trainer.config import load_config, to_yaml

BASE = "someone/base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATA = {"rows": 40, "train_rows": 36, "validation_rows": 4, "tokens": 1234567, "trained_tokens": 343, "length_max": 19}


def weights(path: Path, rows: int = 8, value: float = 0.5) -> None:
    """Write a small safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(path), {"model.layers.0.self_attn.q_proj.lora_a": mx.full((rows, 4), value)})


def adapter(folder: Path, base: str = BASE, **settings: Any) -> Path:
    """Write an adapter in mlx-lm's layout."""
    weights(folder / "adapters.safetensors")
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"], "alpha": 8.0}
    config = {"model": base, "fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def peft(folder: Path, base: str = BASE) -> Path:
    """Write what stands for an adapter in PEFT's layout."""
    weights(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def run(folder: Path, base: str = BASE, dataset: str = "hf:someone/chats", **facts: Any) -> Path:
    """Write a run's folder as a training leaves it, with an adapter and much that is nobody's business; return both."""
    adapter(folder / "adapter", base)
    config = load_config(overrides={"data.dataset_path": dataset, "model.model_name": base, "lora.rank": 4})
    (folder / "config.yaml").write_text(to_yaml(config))
    known = {"model": {"name": base, "revision": COMMIT}, "data": DATA, "packages": {"mlx": "0.32.4"}, **facts}
    (folder / "environment.json").write_text(json.dumps(known))
    losses = [(3, 2.5), (6, 1.25), (9, 1.5)]
    lines = [json.dumps({"step": step, "val/loss": loss, "val/perplexity": 2 * loss}) for step, loss in losses]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "adapter"
