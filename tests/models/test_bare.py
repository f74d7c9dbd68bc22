"""The base behind its adapters."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import inject_lora, load_model
from mlx_trainer.models.bare import without_adapters
from mlx_trainer.models.lora import adapted_layers
from tests.tiny import tiny_mistral

IDS = mx.array([[1, 3, 40, 50, 60, 4]])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_without_its_adapters_a_model_is_its_base_bit_for_bit(tmp_path: Path, bits: int | None, value: float) -> None:
    """Even where an adapter gives NaN; afterwards the same adapters are in their place."""
    directory = tiny_mistral(tmp_path, bits=bits)
    lora = LoRAConfig(rank=2, alpha=4, target_modules=["q_proj", "down_proj", "lm_head"])
    base, model = load_model(directory), inject_lora(load_model(directory), lora)
    for layer in adapted_layers(model).values():
        layer.lora_b = mx.full(layer.lora_b.shape, value)
    model.eval()
    before, adapted = adapted_layers(model), np.array(model(IDS))
    with without_adapters(model):
        assert np.array(model(IDS)).tobytes() == np.array(base(IDS)).tobytes()
        assert not adapted_layers(model)
    assert adapted_layers(model) == before
    assert np.array(model(IDS)).tobytes() == adapted.tobytes() != np.array(base(IDS)).tobytes()
