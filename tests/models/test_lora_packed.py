"""Adapters on packed bases of every kind that MLX has: a step is that on the same weights, dequantized."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from attrs import evolve
from mlx.utils import tree_flatten, tree_unflatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.loading import cast, load_model
from mlx_trainer.models.lora import linear_layers, trainable
from mlx_trainer.models.lora.layers import dense_weight
from mlx_trainer.traced import from_tree, to_tree
from tests.models.batches import labelled
from tests.models.test_recomputation import batch_of
from tests.models.test_unpadded import ROWS
from tests.tiny import tiny_mistral

PACKINGS = [
    *(("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
ODD = [("affine", 3, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16)]
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["q_proj", "v_proj", "down_proj"])
MEMBERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Mistral."""
    return tiny_mistral(tmp_path_factory.mktemp("model"))


def module_of(folder: Path, base: nn.Module, lora: LoRAConfig) -> CausalLMModule:
    """A module that trains adapters on `base`, which have moved already."""
    module = CausalLMModule(folder, lora=lora, dtype="float32", max_seq_length=64, schedule="constant", warmup_steps=0)
    module.load_model = lambda: base  # type: ignore[method-assign]
    for i, (name, value) in enumerate(sorted(trainable(module.model).items())):
        if not name.endswith(".m"):
            value[:] = value + mx.random.normal(value.shape, key=mx.random.key(i)) * 0.05
    return module


def dequantized(folder: Path, packed: nn.Module) -> nn.Module:
    """The dense model with the weights that a packed one stands for."""
    model = load_model(folder, dtype="float32")
    layers = linear_layers(packed) | {"model.embed_tokens": packed.model.embed_tokens}
    model.load_weights([(f"{path}.weight", dense_weight(layer)) for path, layer in layers.items()], strict=False)
    return model


CASES = [(packing, name) for packing in PACKINGS for name in MEMBERS if name == "lora" or packing in ODD]


@pytest.mark.parametrize(("packing", "name"), CASES)
def test_a_step_on_packed_weights_is_one_on_the_same_dense_weights(
    folder: Path, packing: tuple[str, int, int], name: str
) -> None:
    """Loss and every gradient to 1e-5 of the largest, finite, padded and unpadded; an update then lowers the loss."""
    packed, (mode, bits, group) = load_model(folder, dtype="float32"), packing
    nn.quantize(packed, group, bits, mode=mode)
    cast(packed, mx.float32)
    lora = evolve(LORA, **MEMBERS[name])
    dense = module_of(folder, dequantized(folder, packed), lora)
    module = module_of(folder, packed, lora)
    unpadded = from_tree(to_tree(batch_of(ROWS)))
    for batch in (labelled(), unpadded):
        results = []
        for one in (dense, module):
            step = nn.value_and_grad(one.model, lambda _, one=one, batch=batch: one.training_loss(batch).total)
            loss, found = step(one.model)
            results.append((loss.item(), dict(tree_flatten(found))))
        (expected_loss, expected), (loss, found) = results
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        largest = max(mx.abs(value).max().item() for value in expected.values())
        assert expected.keys() == found.keys() == trainable(module.model).keys()
        for key, value in expected.items():
            assert mx.abs(found[key] - value).max().item() <= 1e-5 * largest, key
    optimizer = module.configure_optimizer(None)
    optimizer.update(module.model, tree_unflatten(list(found.items())))
    assert module.training_loss(unpadded).total.item() < loss


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", "affine"])
def test_packed_embeddings_give_the_models_type(folder: Path, mode: str, dtype: mx.Dtype) -> None:
    """MLX's give bfloat16 in three modes: activations of the first block, and adapters on the embedding, lost bits."""
    model = load_model(folder, dtype="float32")
    nn.quantize(model, 16 if mode == "nvfp4" else 32, None if mode != "affine" else 4, mode=mode)
    cast(model, dtype)
    ids = mx.array([[1, 17, 300]])
    assert model.model.embed_tokens(ids).dtype == model(ids).dtype == dtype
    exact = dense_weight(model.model.embed_tokens)[ids]
    assert mx.array_equal(model.model.embed_tokens(ids), exact.astype(dtype)).item() or mode == "affine"
