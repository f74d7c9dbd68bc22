"""The estimate for padded batches, from the graph alone, is near the measured peak; where there is none, None."""

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import Trainer
from mlx_trainer.callbacks import GradientClipping, NaNGuard
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.padded import Batch, collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.memory import size
from mlx_trainer.preference import DPOModule
from mlx_trainer.state import random_state
from tests import families
from tests.families import tiny_family
from tests.models.test_unpadded import LINEARS, rows_of
from tests.preference.pairs import pairs_of, shape_of
from tests.tiny import tiny_mistral

QV = LoRAConfig(rank=8, dropout=0.0)
ALL = LoRAConfig(rank=4, dropout=0.1, target_modules=LINEARS)
SIZES: list[tuple[int, int, LoRAConfig | None, int, int]] = [
    (64, 12, QV, 4, 64),
    (128, 8, QV, 2, 128),
    (64, 6, ALL, 8, 32),
    (256, 8, ALL, 2, 64),
    (64, 12, None, 4, 64),
]
"""Hidden size, layers, adapters, rows, length."""


def batch_of_size(rows: int, length: int) -> Batch:
    """Equal rows, two thirds of each trained."""
    trained = [[i % 3 > 0 for i in range(length - 1)]] * rows
    return collate(rows_of([length] * rows, trained, 0), Shape(rows, length, rows * length, 0, 0))


def assert_near(module: CausalLMModule, batch: Batch) -> None:
    """The estimate is within a tenth of the peak of two compiled steps, what others hold left out."""
    module.setup("fit")
    mx.eval(module.model.parameters())
    expected = module.memory_estimate(batch)
    mx.enable_compile()
    gc.collect()
    mx.synchronize()
    others = mx.get_active_memory() - size(module.model.parameters())
    mx.reset_peak_memory()
    Trainer(max_steps=2, callbacks=[GradientClipping(), NaNGuard()]).fit(module, [batch] * 2)
    mx.synchronize()
    assert expected == pytest.approx(mx.get_peak_memory() - others, rel=0.1)


@pytest.mark.parametrize("of", SIZES, ids=str)
def test_the_estimate_is_within_a_tenth(tmp_path: Path, of: Any) -> None:
    """Of the measured peak, weights and optimizer included, with adapters and without."""
    hidden, layers, lora, rows, length = of
    tiny_mistral(tmp_path, hidden_size=hidden, layers=layers)
    assert_near(CausalLMModule(tmp_path, dtype="float32", lora=lora, max_seq_length=256), batch_of_size(rows, length))


@pytest.mark.parametrize("family", ["gemma2", "phi3", "olmo2", "glm4"])
def test_it_knows_no_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Models that never have unpadded batches are told as near."""
    monkeypatch.setitem(families.SIZES, "num_hidden_layers", 8)
    lora = LoRAConfig(rank=4, dropout=0.1, target_modules="all-linear")
    module = CausalLMModule(tiny_family(tmp_path, family), dtype="float32", lora=lora, max_seq_length=256)
    assert_near(module, batch_of_size(4, 64))


def test_pairs_are_counted_too(tmp_path: Path) -> None:
    """With the reference, of which nothing is kept."""
    tiny_mistral(tmp_path, layers=12)
    rows = pairs_of([(32, 32, 32)] * 2)
    module = DPOModule(tmp_path, dtype="float32", lora=ALL, max_seq_length=256)
    assert_near(module, collate(rows, shape_of(rows)))


def test_what_cannot_be_written_down_is_not_guessed(tmp_path: Path) -> None:
    """Trained experts and packed layers have functions of their own in the graph."""
    lora = LoRAConfig(rank=4, target_modules="all-linear")
    for name, folder in {
        "experts": tiny_family(tmp_path / "experts", "mixtral"),
        "packed": tiny_mistral(tmp_path / "packed", bits=4),
    }.items():
        module = CausalLMModule(folder, dtype="float32", lora=lora, max_seq_length=256)
        module.setup("fit")
        assert module.memory_estimate(batch_of_size(2, 16)) is None, name


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    """Parameters are the same arrays as before, and dropout draws what it would have drawn."""
    tiny_mistral(tmp_path)
    module = CausalLMModule(tmp_path, dtype="float32", lora=ALL, max_seq_length=256)
    module.setup("fit")
    before, seed = dict(tree_flatten(module.model.parameters())), random_state()
    assert module.memory_estimate(batch_of_size(2, 16))
    after = dict(tree_flatten(module.model.parameters()))
    assert {name: id(value) for name, value in after.items()} == {name: id(value) for name, value in before.items()}
    assert random_state() == seed
