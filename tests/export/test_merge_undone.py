"""The check that merged minus adapter is the base: it holds for what was merged, and finds each thing that is not."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer.export.merging.merge import merge
from mlx_trainer.export.merging.unmerge import check_unmerge
from mlx_trainer.models.error import ModelError
from tests.export.random_adapters import ROWS, random_adapter, tensors_of
from tests.tiny import tiny_mistral

FIRST = "model.layers.0.self_attn.q_proj.weight"


def changed(merged: Path, name: str, change: float) -> None:
    """Add to one value of one weight."""
    tensors = tensors_of(merged)
    tensors[name][0, 0] = tensors[name][0, 0] + change
    mx.save_safetensors(str(merged / "model.safetensors"), tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("base_dtype", [mx.float32, mx.bfloat16])
def test_what_was_merged_unmerges_within_rounding(tmp_path: Path, dtype: str, base_dtype: mx.Dtype) -> None:
    """For every type, tensor by tensor; and rounding is used, so that the bound is no empty one."""
    base = tiny_mistral(tmp_path / "base", dtype=base_dtype)
    adapter = random_adapter(base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged", dtype=dtype, rows=ROWS).directory
    result = check_unmerge(merged, adapter)
    assert (result.weights, result.changed, result.wrong) == (len(tensors_of(base)), 4, ())
    assert (0.9 if dtype != "float32" else 0.0) < result.worst <= 1
    assert str(result).startswith(f"Merged minus adapter equals the base in all {result.weights} weights (4 of them")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_dequantized_merge_unmerges_to_what_the_packed_base_stands_for(tmp_path: Path, bits: int) -> None:
    """The base's packed weights are dequantized for the comparison."""
    base = tiny_mistral(tmp_path / "base", bits=bits)
    adapter = random_adapter(base, tmp_path / "adapter")
    assert check_unmerge(merge(adapter, tmp_path / "merged", rows=ROWS).directory, adapter).wrong == ()


@pytest.mark.parametrize("name", [FIRST, "model.layers.1.mlp.gate_proj.weight", "lm_head.weight"])
def test_one_wrong_value_is_found_and_named(tmp_path: Path, name: str) -> None:
    """In a weight that the adapter changed, and in one that it did not: a thousandth in one of its values."""
    base = tiny_mistral(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged", rows=ROWS).directory
    changed(merged, name, 1e-3)
    result = check_unmerge(merged, adapter)
    assert result.wrong == (name,)
    assert result.worst > 1
    assert str(result) == f"Merged minus adapter is not the base in 1 of {result.weights} weights: {name}."


def test_another_adapter_or_base_is_not_it(tmp_path: Path) -> None:
    """With another adapter exactly its weights are wrong; NaN is wrong too."""
    base = tiny_mistral(tmp_path / "base")
    adapter, other = (random_adapter(base, tmp_path / f"adapter-{seed}", seed=seed) for seed in (0, 1))
    merged = merge(adapter, tmp_path / "merged", rows=ROWS).directory
    assert len(check_unmerge(merged, other).wrong) == 4
    assert len(check_unmerge(merged, adapter, base=str(tiny_mistral(tmp_path / "other", seed=1))).wrong) > 4
    changed(merged, "lm_head.weight", float("nan"))
    assert check_unmerge(merged, adapter).wrong == ("lm_head.weight",)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """A packed merge, and weights that are missing."""
    base = tiny_mistral(tmp_path / "base", bits=4)
    adapter = random_adapter(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="is quantized: packing has changed"):
        check_unmerge(merge(adapter, tmp_path / "packed", requantize=True, rows=ROWS).directory, adapter)
    merged = merge(adapter, tmp_path / "merged", rows=ROWS).directory
    tensors = tensors_of(merged)
    tensors.pop("model.norm.weight")
    mx.save_safetensors(str(merged / "model.safetensors"), tensors)
    with pytest.raises(ModelError, match=r"do not have the same weights: model\.norm\.weight"):
        check_unmerge(merged, adapter)
