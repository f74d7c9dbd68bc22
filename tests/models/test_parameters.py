"""Counting parameters: totals, trainable share, packed weights and the table."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import inject_lora
from mlx_trainer.models.parameters import parameter_stats
from tests.tiny import tiny_mistral

LORA = LoRAConfig(rank=4, target_modules=["q_proj", "down_proj"])
#: Rank 4 on q_proj (64, 64) and down_proj (128, 64), twice.
ADAPTERS = 2 * (4 * (64 + 64) + 4 * (128 + 64))


def test_totals_equal_the_arrays(tmp_path: Path) -> None:
    """Without packing, parameters and bytes are the sums over all arrays, and the trainable ones the adapters'."""
    model = inject_lora(load_model(tiny_mistral(tmp_path), dtype="float16"), LORA)
    arrays = [value for _, value in tree_flatten(model.parameters())]
    stats = parameter_stats(model)
    assert stats.total == sum(value.size for value in arrays)
    assert stats.bytes == sum(value.nbytes for value in arrays) == 2 * (stats.total - ADAPTERS) + 4 * ADAPTERS
    assert stats.trainable == ADAPTERS
    assert stats.percent == 100 * ADAPTERS / stats.total


def test_a_packed_model_has_as_many_parameters_as_the_plain_one(tmp_path: Path) -> None:
    """4-bit weights count as what they stand for; their bytes are what they take."""
    plain, packed = (
        parameter_stats(inject_lora(load_model(tiny_mistral(tmp_path / str(bits), bits=bits)), LORA))
        for bits in (None, 4)
    )
    assert (packed.total, packed.trainable) == (plain.total, plain.trainable)
    assert packed.bytes < 0.5 * plain.bytes


def test_the_table_has_a_row_for_each_kind_of_layer(tmp_path: Path) -> None:
    """Layers that differ in their number share a row with their range, rank or bits, and whether they train."""
    model = inject_lora(load_model(tiny_mistral(tmp_path, layers=3, bits=4)), LORA)
    lines = [line.split() for line in str(parameter_stats(model)).splitlines()]
    assert ["layers.0-2.self_attn.q_proj", "LoRALinear", "r4", "1.54", "K", "trains"] in lines
    assert ["layers.0-2.self_attn.q_proj.linear", "QuantizedLinear", "4-bit", "12.3", "K"] in lines
    assert ["norm", "RMSNorm", "64"] in lines
    assert " ".join(lines[-1]).startswith("3.84 K of 164 K parameters train (2.34 %); 0.1 MB")


def test_layers_that_differ_keep_rows_of_their_own(tmp_path: Path) -> None:
    """An adapter on some blocks only is told with the numbers of those blocks."""
    targets = ["layers.0.self_attn.v_proj", "layers.2.self_attn.v_proj"]
    model = inject_lora(load_model(tiny_mistral(tmp_path, layers=3)), LoRAConfig(rank=2, target_modules=targets))
    names = {(group.name, group.kind) for group in parameter_stats(model).groups}
    assert {("layers.0,2.self_attn.v_proj", "LoRALinear r2"), ("layers.1.self_attn.v_proj", "Linear")} < names


def test_counting_reads_nothing() -> None:
    """A model whose values are not computed yet is counted without computing them."""
    from mlx import nn

    layer = nn.Linear(4, 4)
    layer.weight = mx.zeros((1 << 20, 1 << 20))  # 4 TB, if anything looked at them
    assert parameter_stats(layer).total == (1 << 40) + 4
