"""The comparison of logits: what it measures, what it lets pass, and that it leaves the models as they were."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.export.checking import Difference, difference, logits_of, same_function, sample_ids
from mlx_trainer.models import CausalLMModule, inject_lora, load_model
from tests.tiny import VOCABULARY, tiny_mistral


def test_the_figures_are_those_written_out() -> None:
    """Largest distance, relative norm and the share of equal first guesses, on rows that differ in each."""
    generator = np.random.default_rng(0)
    expected, other = generator.normal(size=(2, 2, 3, 8)).astype(np.float32)
    found = difference(mx.array(expected), mx.array(other))
    assert found.max_abs == pytest.approx(np.abs(expected - other).max())
    assert found.relative == pytest.approx(np.linalg.norm(other - expected) / np.linalg.norm(expected))
    assert found.argmax_agreement == pytest.approx(np.mean(expected.argmax(-1) == other.argmax(-1)))
    assert 0 <= found.argmax_agreement < 1


def test_it_is_told_in_one_line() -> None:
    """Absolute, relative and the first guess."""
    line = str(Difference(3e-7, 1e-8, 0.9925))
    assert line == "logits differ by at most 3.0e-07 (1.0e-08 of their size), 99.25 % same first guess"


def test_modules_and_models_are_compared_in_eval_mode_and_keep_theirs(tmp_path: Path) -> None:
    """Dropout of 0.5 in training mode changes nothing; a module and its own model are equal; modes stay."""
    base = tiny_mistral(tmp_path)
    module = CausalLMModule(str(base), dtype="float32", lora=LoRAConfig(rank=2, dropout=0.5))
    module.model.train(True)
    ids = sample_ids(VOCABULARY)
    assert difference(logits_of(module, ids), logits_of(load_model(base, dtype="float32"), ids)) == Difference(
        0.0, 0.0, 1.0
    )
    assert module.model.training
    assert logits_of(module, ids).dtype == mx.float32


def test_another_adapter_is_another_function_and_rounding_is_not(tmp_path: Path) -> None:
    """A sign turned in one factor is seen, a float32 rounding is not, and NaN is never the same."""
    model = load_model(tiny_mistral(tmp_path), dtype="float32")
    ids = sample_ids(VOCABULARY)
    base = logits_of(model, ids)
    adapted = inject_lora(model, LoRAConfig(rank=2, dropout=0.0))
    layer = adapted.model.layers[0].self_attn.q_proj
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1)) * 0.1
    expected = logits_of(adapted, ids)
    layer.lora_b = layer.lora_b * (1 + 1e-6)
    assert same_function(base, expected, logits_of(adapted, ids))
    layer.lora_b = -layer.lora_b
    assert not same_function(base, expected, logits_of(adapted, ids))
    assert not same_function(base, expected, expected * mx.nan)
    assert same_function(base, base, base)


def test_sampled_ids_are_of_the_vocabulary_and_always_the_same() -> None:
    """Two draws are equal, distinct in their rows, and reach both halves of the vocabulary."""
    ids = np.array(sample_ids(64))
    assert np.array_equal(ids, np.array(sample_ids(64)))
    assert (ids.shape, ids.min() >= 0, ids.max() < 64, ids.min() < 32 <= ids.max()) == ((4, 32), True, True, True)
    assert len({tuple(row) for row in ids}) == 4
