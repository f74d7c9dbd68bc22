"""Every family trains and comes back: what is loaded, what trains, what stays, and that the adapter is read again.

Left out for what mlx-lm 0.32.2 does: `gemma` and `starcoder2` take another GELU than their configuration names (7e-4
from transformers), `gpt_oss` and `lfm2` do not open what transformers 5 writes.
"""

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import Trainer
from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import CausalLMModule, load_model
from mlx_trainer.models.hf_config import normalised
from mlx_trainer.models.lora import adapted_layers, linear_layers
from tests.families import FAMILIES, OF_PICTURES, WINDOW, tiny_family, torch_family
from tests.models.batches import labelled
from tests.tiny import tiny_mistral

IDS = np.random.default_rng(0).integers(10, 380, (2, 19))


def logits(model: Any) -> mx.array:
    """The logits of rows that are longer than the window of sliding layers."""
    model.eval()
    result: mx.array = model(mx.array(IDS))
    return result


def block_targets(directory: Path) -> list[str]:
    """The name of every linear layer of the blocks, routers of experts included."""
    paths = linear_layers(load_model(directory, dtype="float32"))
    return sorted({path.rpartition(".")[2] for path in paths if ".layers." in path})


def module_of(directory: Path, targets: list[str]) -> CausalLMModule:
    """A module with adapters on `targets`."""
    lora = LoRAConfig(rank=2, alpha=8.0, dropout=0.0, target_modules=targets)
    optimization = {"learning_rate": 0.01, "warmup_steps": 0, "schedule": "constant"}
    return CausalLMModule(directory, lora=lora, dtype="float32", max_seq_length=64, **optimization)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_its_adapter_is_read_again(tmp_path: Path, family: str) -> None:
    """The loss falls, every adapter moves, the base stays bit for bit; we and mlx-lm read the adapter to its logits."""
    directory = tiny_family(tmp_path / "model", family)
    targets = block_targets(directory)
    module, batch = module_of(directory, targets), labelled((9, 5, 7))
    base = {name: np.array(value) for name, value in tree_flatten(load_model(directory, dtype="float32").parameters())}
    start = {path: np.array(layer.lora_a) for path, layer in adapted_layers(module.model).items()}
    losses = []
    for _ in range(2):
        losses.append(module.training_loss(batch).total.item())
        Trainer(max_steps=3).fit(module, [batch])

    assert losses[1] < losses[0]
    for path, layer in adapted_layers(module.model).items():
        assert not np.array_equal(np.array(layer.lora_a), start[path]), path
        assert np.abs(np.array(layer.lora_b)).max() > 0, path
    after = dict(tree_flatten(module.model.parameters()))
    after = {name.replace(".linear.", "."): value for name, value in after.items() if ".lora_" not in name}
    assert {name: np.array_equal(np.array(value), base[name]) for name, value in after.items()} == dict.fromkeys(
        base, True
    )

    module.save(tmp_path / "adapter")
    trained, again = logits(module.model), module_of(directory, targets)
    again.load(tmp_path / "adapter")
    assert mx.array_equal(logits(again.model), trained).item()
    assert mx.abs(trained - logits(load_model(directory, dtype="float32"))).max().item() > 1e-3
    from mlx_lm import load

    theirs, _ = load(str(directory), adapter_path=str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(theirs), trained, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *OF_PICTURES])
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """A folder that transformers 5 wrote gives the same logits: rope, windows, experts and heads are read right."""
    torch = pytest.importorskip("torch", reason="transformers computes logits with PyTorch")
    model = torch_family(tmp_path, family)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits.numpy()
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits(load_model(tmp_path, dtype="float32")), expected, atol=1e-4)


def test_what_stands_in_a_configuration_already_wins() -> None:
    """The names of transformers 4 are filled in from those of 5 where they are absent; a null scaling is absent."""
    rope = {"rope_theta": 5e5, "rope_type": "yarn", "factor": 2.0}
    config = {"model_type": "llama", "rope_theta": 7.0, "rope_scaling": None, "rope_parameters": rope}
    settings = normalised(config, ["model.lm_head.weight"])
    assert (settings["rope_theta"], settings["tie_word_embeddings"]) == (7.0, False)
    assert settings["rope_scaling"] == {"type": "yarn", "rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(("family", "told"), [("mistral", True), ("olmo3", False)])
def test_a_window_that_mlx_lm_passes_over_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, told: bool
) -> None:
    """Mistral v0.1 looks 4096 positions back, here 4, and mlx-lm does not know; rows within the window are exact."""
    if family == "mistral":
        config = json.loads((tiny_mistral(tmp_path) / "config.json").read_text()) | {"sliding_window": WINDOW}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        tiny_family(tmp_path, family)
    for length in (WINDOW, WINDOW + 1):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            CausalLMModule(tmp_path, dtype="float32", max_seq_length=length).load_model()
        assert ("its layers see all" in caplog.text) is (told and length > WINDOW)
