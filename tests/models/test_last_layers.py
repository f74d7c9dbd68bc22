"""Full fine-tuning of the last blocks: what trains, what the backward pass skips, and mlx-lm as the other reader."""

import doctest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import trained
from mlx_trainer.config import LoRAConfig, ModelConfig
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.models import CausalLMModule, ModelError, last_layers, unpadded
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.lora import trainable
from mlx_trainer.models.unpadded import swiglu
from mlx_trainer.traced import from_tree, to_tree
from tests.models.test_causal_lm import arrays, changed, module_in, train
from tests.models.test_unpadded import ROWS, loss_and_gradients
from tests.tiny import tiny_mistral

IDS = mx.array([[1, 17, 300, 45, 9], [1, 5, 6, 350, 2]])
BATCH = collate_unpadded(ROWS, Shape(4, 12, 40), predictions=24)


def last(directory: Path, count: int, **options: Any) -> CausalLMModule:
    """A module whose last `count` blocks of four train."""
    if not directory.exists():
        tiny_mistral(directory, layers=4)
    return module_in(directory, lora=None, trainable_layers=count, **options)


@pytest.mark.parametrize("count", [1, 3])
def test_the_last_blocks_train_and_nothing_else(tmp_path: Path, count: int) -> None:
    """Every parameter of these moves; embedding, final norm, head and earlier blocks stay bit for bit."""
    module = last(tmp_path / "base", count)
    before = arrays(module)
    train(module, 2)
    assert changed(before, module) == {
        name for name in before if any(f"layers.{number}." in name for number in range(4 - count, 4))
    }
    state = module.configure_optimizer(2)
    state.init(module.model.trainable_parameters())
    moments = {name.rpartition(".")[0] for name, _ in tree_flatten(state.state) if name.endswith((".m", ".v"))}
    assert moments == changed(before, module)


def test_the_loss_and_its_gradients_are_those_of_full_fine_tuning(tmp_path: Path) -> None:
    """What is frozen changes neither the loss nor any gradient that is left."""
    part, whole = last(tmp_path / "base", 2), module_in(tmp_path / "base", lora=None)
    ours, theirs = loss_and_gradients(part, BATCH), loss_and_gradients(whole, BATCH)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)  # the head is frozen, and computed in other parts
    assert set(ours[2]) == set(trainable(part.model)) < set(theirs[2])
    for name, gradient in ours[2].items():
        assert mx.allclose(gradient, theirs[2][name], rtol=1e-4, atol=1e-5).item(), name


@pytest.mark.parametrize("count", [1, 3])
def test_the_backward_pass_ends_at_the_first_block_that_trains(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of an MLP is computed in as many blocks as train."""
    backward: list[int] = []

    def counted(gate: mx.array, up: mx.array) -> mx.array:
        function = mx.custom_function(lambda gate, up: swiglu(gate, up))
        function.vjp(
            lambda primals, cotangent, output: (backward.append(1), mx.vjp(swiglu, primals, [cotangent])[1])[1]
        )
        return function(gate, up)  # type: ignore[return-value]

    monkeypatch.setattr(unpadded, "swiglu", counted)
    loss_and_gradients(last(tmp_path / "base", count), BATCH)
    assert len(backward) == count


def test_adapters_can_be_on_the_last_blocks_alone(tmp_path: Path) -> None:
    """For LoRA the same option means the numbers of these blocks, as `layers_to_transform` has them."""
    tiny_mistral(tmp_path, layers=4)
    by_count = module_in(tmp_path, lora=LoRAConfig(rank=4), trainable_layers=2)
    by_number = module_in(tmp_path, lora=LoRAConfig(rank=4, layers_to_transform=[2, 3]))
    names = set(trainable(by_count.model))
    assert {name.split(".")[2] for name in names} == {"2", "3"}
    assert changed(arrays(by_number), by_count) == set()
    before = arrays(by_count)
    train(by_count, 2)
    assert changed(before, by_count) == names


def test_memory_is_estimated_for_the_blocks_that_train(tmp_path: Path) -> None:
    """Nothing is kept for gradients in frozen blocks before the first that trains, nor any optimizer state."""
    needed = [last(tmp_path / "base", n, recompute="none")._estimate(from_tree(to_tree(BATCH))) for n in (1, 2, 4)]
    kept = [one.kept for one in needed]
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0
    assert [round(one.state / needed[0].state) for one in needed] == [1, 2, 4]


def test_mlx_lm_opens_what_is_saved(tmp_path: Path) -> None:
    """The file holds the last two blocks, says so, and mlx_lm.load computes the trained model's logits."""
    from mlx_lm.utils import load

    module = last(tmp_path / "base", 2)
    train(module, 2)
    module.save(tmp_path / "adapter")
    written = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (written["fine_tune_type"], written["num_layers"], module.artifact) == ("full", 2, "adapter")
    assert set(mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))) == set(trainable(module.model))
    theirs, _ = load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapter"))
    expected = np.array(module.model.eval()(IDS))
    assert np.abs(expected - np.array(theirs(IDS))).max() <= 1e-6
    plain = trained.trained_module(ModelConfig(str(tmp_path / "base"), dtype="float32"), None)
    assert np.abs(expected - np.array(plain.model(IDS))).max() > 1e-3


@pytest.mark.parametrize("count", [2, 4, None])
def test_what_is_saved_is_opened_here(tmp_path: Path, count: int | None) -> None:
    """`generate` and `evaluate` find out from the file whether it has blocks or the whole model."""
    module = last(tmp_path / "base", count)  # type: ignore[arg-type]
    train(module, 2)
    module.save(tmp_path / "adapter")
    opened = trained.trained_module(ModelConfig(str(tmp_path / "base"), dtype="float32"), str(tmp_path / "adapter"))
    assert changed(arrays(module), opened) == set()


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    """More blocks than there are, packed blocks, and an option of the other method."""
    with pytest.raises(ModelError, match=r"trainable_layers is 5; this model has 4 layers"):
        last(tmp_path / "base", 5)
    tiny_mistral(tmp_path / "packed", bits=4)
    with pytest.raises(ModelError, match="cannot train packed weights"):
        last(tmp_path / "packed", 1)
    with pytest.raises(ModelError, match=r"trainable_layers and lora\.layers_to_transform both choose blocks"):
        CausalLMModule("x", lora=LoRAConfig(layers_to_transform=[1]), trainable_layers=2)
    with pytest.raises(ModelError, match="loraplus_lr_ratio is for adapters"):
        CausalLMModule("x", lora=None, dtype="float32", loraplus_lr_ratio=16.0)


def test_the_examples_in_docstrings_run() -> None:
    """They give what they show."""
    assert doctest.testmod(last_layers).failed == 0
