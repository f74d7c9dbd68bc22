"""The Mistral module: its default, and that it takes nothing else."""

import json
from pathlib import Path

import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import MistralLoRAModule, ModelError
from tests.tiny import tiny_mistral


def test_it_names_a_model_and_passes_arguments_on() -> None:
    """Without a name it is Mistral-7B-Instruct-v0.3; every argument of CausalLMModule is taken."""
    module = MistralLoRAModule(lora=LoRAConfig(rank=2), seed=5)
    assert (module.name, module.lora, module.seed) == (
        "mistralai/Mistral-7B-Instruct-v0.3",
        LoRAConfig(rank=2),
        5,
    )


def test_another_architecture_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """A Llama folder, here without any weights, is an error that names its model_type; a Mistral one loads."""
    directory = tiny_mistral(tmp_path)
    module = MistralLoRAModule(directory)
    module.setup("predict")
    assert module.parameter_stats.percent < 10
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match='has model_type "llama", not "mistral"; use CausalLMModule'):
        MistralLoRAModule(directory).setup("fit")
