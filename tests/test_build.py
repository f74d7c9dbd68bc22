"""From a configuration to a run: every option reaches its place, and a refused run leaves nothing behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny import tiny_mistral

from mlx_trainer import build, cli
from mlx_trainer.callback import Callback
from mlx_trainer.checkpoint import CheckpointError
from mlx_trainer.config import Config, ConfigError, LoRAConfig, ModelConfig, load_config
from mlx_trainer.config.keys import keys
from mlx_trainer.models import CausalLMModule, MistralLoRAModule, ModelError

QUICK = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 64,
    "lora.rank": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 2,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-2,
    "data.dataset_path": "chats.jsonl",
    "data.train_split": 0.75,
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds a tiny model, `base`, and eight chats of uneven length, `chats.jsonl`."""
    monkeypatch.chdir(tmp_path)
    tiny_mistral(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": "dog " * n}, {"role": "assistant", "content": f"the sum is {n}"}]}
        for n in range(1, 9)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(**overrides: object) -> Config:
    """Return a configuration that trains in a second; `lora__rank=8` sets lora.rank."""
    return load_config(overrides=QUICK | {key.replace("__", "."): value for key, value in overrides.items()})


def callback(found: Config, name: str) -> Any:
    """Return the callback of this name that a configuration asks for."""
    return next(each for each in build.build_callbacks(found) if type(each).__name__ == name)


def lora_of(found: Config) -> LoRAConfig:
    """Return the adapters that the module of a configuration is going to have."""
    lora = build.build_module(found).lora
    assert lora is not None
    return lora


def optimization(found: Config) -> dict[str, object]:
    """Return what the module of a configuration makes its optimizer from."""
    return build.build_module(found)._optimization


# For each option a value other than the default, and where that value must arrive.
PLACES: dict[str, tuple[object, Callable[[Config], object]]] = {
    "model.model_name": ("./base", lambda c: build.build_module(c).name),
    "model.cache_dir": ("cache", lambda c: build.build_module(c).cache_dir),
    "model.revision": ("main", lambda c: build.base_arguments(c.model)["revision"]),
    "model.dtype": ("bfloat16", lambda c: build.build_module(c).dtype),
    "model.max_seq_length": (48, lambda c: (build.build_module(c).max_seq_length, data(c).max_seq_length)[1]),
    "model.trust_remote_code": (True, lambda c: build.build_module(c).trust_remote_code),
    "lora.rank": (8, lambda c: lora_of(c).rank),
    "lora.alpha": (4.0, lambda c: lora_of(c).alpha),
    "lora.dropout": (0.25, lambda c: lora_of(c).dropout),
    "lora.target_modules": (("o_proj",), lambda c: lora_of(c).target_modules),
    "training.method": ("full", lambda c: "full" if build.build_module(c).lora is None else "lora"),
    "training.batch_size": (3, lambda c: data(c).batch_size),
    "training.gradient_accumulation_steps": (5, lambda c: trainer(c).accumulate),
    "training.num_epochs": (7, lambda c: trainer(c).max_epochs),
    "training.max_steps": (9, lambda c: trainer(c).max_steps),
    "training.optimizer": ("lion", lambda c: optimization(c)["name"]),
    "training.schedule": ("linear", lambda c: optimization(c)["schedule"]),
    "training.learning_rate": (3e-4, lambda c: optimization(c)["learning_rate"]),
    "training.warmup_steps": (1, lambda c: optimization(c)["warmup_steps"]),
    "training.weight_decay": (0.5, lambda c: optimization(c)["weight_decay"]),
    "training.max_grad_norm": (0.5, lambda c: callback(c, "GradientClipping").max_norm),
    "training.save_steps": (11, lambda c: callback(c, "ModelCheckpoint").every),
    "training.keep_last": (4, lambda c: callback(c, "ModelCheckpoint").keep_last),
    "training.keep_best": (False, lambda c: callback(c, "ModelCheckpoint").monitor is not None),
    "training.eval_steps": (13, lambda c: callback(c, "Evaluation").every),
    "training.logging_steps": (17, lambda c: trainer(c).log_every),
    "data.dataset_path": ("./chats.jsonl", lambda c: f"./{data(c).train_rows[0].source.split(':')[0]}"),
    "data.validation_path": ("held_out.jsonl", lambda c: data(c).validation_rows[0].source.split(":")[0]),
    "data.completion_style": ("raw", lambda c: c.data.completion_style),
    "data.train_split": (0.5, lambda c: len(data(c).train_rows) / 8),
    "data.shuffle": (False, lambda c: data(c).shuffle),
    "data.seed": (3, lambda c: (data(c).seed + trainer(c).seed + build.build_module(c).seed) / 3),
    "data.num_workers": (1, lambda c: data(c).num_workers),
    "evaluation.sample_prompts": (("a", "b"), lambda c: tuple(callback(c, "SampleGenerator").prompts)),
    "evaluation.patience": (6, lambda c: callback(c, "EarlyStopping").patience),
    "run.directory": ("elsewhere", lambda c: str(build.run_directory(c))),
    "run.resume": ("auto", lambda c: trainer(c).resume),
    "run.tensorboard": (False, lambda c: any("TensorBoard" in type(each).__name__ for each in build.build_callbacks(c))),
}
ELSEWHERE = {"evaluation.sample_tokens"}


def data(found: Config) -> Any:
    """Return the rows of a configuration."""
    return build.build_data(found, build.build_module(found))


def trainer(found: Config) -> Any:
    """Return the trainer of a configuration."""
    return build.build_trainer(found, Path("run"))
