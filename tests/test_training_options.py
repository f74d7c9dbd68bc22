"""How a run trains, in the compiled step: each option goes on bit for bit after a stop."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer import LambdaCallback, Trainer, build
from mlx_trainer.config import load_config
from tests.tiny import tiny_mistral

QUICK = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 64,
    "lora.rank": 4,
    "lora.dropout": 0.1,
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.num_epochs": 9,
    "training.max_steps": 6,
    "training.warmup_steps": 1,
    "training.learning_rate": 1e-2,
    "training.save_steps": 2,
    "data.dataset_path": "chats.jsonl",
    "data.train_split": 1.0,
    "data.max_shapes": 1,
    "run.tensorboard": False,
}
OPTIONS: Mapping[str, dict[str, object]] = {
    "averaged noise at two rates": {
        "training.loraplus_lr_ratio": 16.0,
        "training.neftune_noise_alpha": 5.0,
        "training.ema_decay": 0.9,
    },
    "last layer in full": {"training.method": "full", "training.trainable_layers": 1},
    "falling ranks": {"adalora.target_r": 2, "adalora.tfinal": 1, "adalora.deltaT": 2},
}
NEWEST = Path("checkpoints/step-00000006")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a tiny model and eight chats of uneven length."""
    monkeypatch.chdir(tmp_path)
    tiny_mistral(tmp_path / "base", hidden_size=32)
    rows = [{"prompt": "dog " * n, "completion": f"the sum is {n}"} for n in range(1, 9)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(folder: str, options: Mapping[str, object], *, until: int = 6, resume: str | None = None) -> None:
    """Take the first `until` of 6 steps of a run in `folder`."""
    config = load_config(overrides=QUICK | options | {"run.directory": folder, "run.resume": resume})

    def stop(trainer: Trainer, module: Any, step: int) -> None:
        if step == until:
            trainer.request_stop("enough")

    module = build.build_module(config)
    trainer = build.build_trainer(config, Path(folder), LambdaCallback("stop", on_step_end=stop), evaluating=False)
    trainer.fit(module, build.build_data(config, module))


def tensors(folder: str) -> dict[str, mx.array]:
    """All that the last checkpoint and the result of a run hold."""
    files = [path for place in (Path(folder, NEWEST), *Path(folder).glob("*")) for path in place.glob("*.safetensors")]
    return {f"{path.relative_to(folder)}: {name}": value for path in files for name, value in loaded(path).items()}


def loaded(path: Path) -> dict[str, mx.array]:
    """The tensors of a file."""
    found = mx.load(str(path))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(name: str) -> None:
    """Stopped at step 3 of 6: parameters, optimizer, callbacks and result are those of a run in one go."""
    train("whole", OPTIONS[name])
    train("parts", OPTIONS[name], until=3)
    train("parts", OPTIONS[name], resume="auto")
    whole, parts = tensors("whole"), tensors("parts")
    assert whole.keys() == parts.keys()
    assert [key for key, value in whole.items() if not mx.array_equal(value, parts[key]).item()] == []
    assert {key.partition("/")[0] for key in whole} == {"checkpoints", "adapter"}
