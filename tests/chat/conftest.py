"""A tiny model with a trained adapter, for conversations."""

from pathlib import Path

import pytest

from mlx_trainer import Trainer
from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import CausalLMModule
from tests.models.batches import labelled
from tests.tiny import tiny_mistral


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that changes every answer; its configuration names the base model's folder."""
    folder = tmp_path_factory.mktemp("chat")
    lora = LoRAConfig(rank=4, alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], dropout=0.1)
    module = CausalLMModule(
        tiny_mistral(folder / "base"),
        lora=lora,
        dtype="float32",
        learning_rate=0.02,
        warmup_steps=0,
        max_seq_length=512,
    )
    Trainer(max_steps=8).fit(module, [labelled((9, 5, 7))])
    module.save(folder / "adapter")
    return folder / "adapter"
