"""Merging: what is written computes what the adapter on its base does, and what cannot be right leaves nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.export.merging import saving
from mlx_trainer.export.merging.adapter import read_adapter
from mlx_trainer.export.merging.base import SAME_NAMES, main_dtype, open_base
from mlx_trainer.export.merging.effect import SENTENCES, measure_effect, sentence_rows
from mlx_trainer.export.merging.merge import merge, merge_into, rounding
from mlx_trainer.export.merging.saving import save_weights
from mlx_trainer.export.merging.unmerge import check_unmerge
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model, load_tokenizer
from tests.export.random_adapters import ROWS, random_adapter, tensors_of
from tests.tiny import tiny_mistral, write_tokenizer

Logits = np.ndarray[Any, Any]
ALL = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]


def adapted_logits(base: Path, adapter: Path) -> Logits:
    """The logits of mlx-lm's own adapter layers on the base, (tokens, vocabulary) in float32."""
    return np.array(measure_effect(base, adapter, ROWS).adapted)


def mlx_lm_logits(directory: Path) -> Logits:
    """The logits of the folder opened by plain `mlx_lm.load`."""
    from mlx_lm import load

    model, _ = load(str(directory))
    return np.concatenate([np.array(model(mx.array([row]))[0].astype(mx.float32)) for row in ROWS])


def transformers_logits(directory: Path) -> Logits:
    """The logits of the folder opened by plain transformers."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to open a model; extra `interop`")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([row])).logits[0].float().numpy() for row in ROWS])


def assert_close(actual: Logits, expected: Logits) -> None:
    """Logits are equal to 1e-4."""
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def foreign_base(directory: Path, kind: str) -> Path:
    """A tiny model that transformers itself makes and writes, with the tests' tokenizer."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to write a model; extra `interop`")
    import transformers

    sizes = {
        "head_dim": 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    own = {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "gemma3_text": {"sliding_window_pattern": 2},
        "cohere2": {"num_hidden_layers": 4},
        "phi": {"hidden_size": 64, "head_dim": 16, "partial_rotary_factor": 0.4},
    }.get(kind, {})
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(sizes | own))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(own | settings))  # as transformers 4 calls it, for mlx-lm
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("targets", [["self_attn.q_proj"], ALL], ids=["q_proj", "all-linear"])
@pytest.mark.parametrize(
    "model", [{}, {"tied": True}, {"transformers5": True}, {"bits": 4}, {"bits": 8}], ids=lambda model: str(model)
)
def test_a_merged_model_is_the_adapter_on_its_base_in_both_programs(
    tmp_path: Path, model: dict[str, Any], targets: list[str]
) -> None:
    """Opened by mlx-lm and by transformers, logits equal adapter-on-base to 1e-4; a quantized base is dequantized."""
    base = tiny_mistral(tmp_path / "base", rope_theta=5000.0, **model)
    adapter = random_adapter(base, tmp_path / "adapter", targets)
    result = merge(adapter, tmp_path / "merged", rows=ROWS)
    expected = adapted_logits(base, adapter)
    assert_close(mlx_lm_logits(result.directory), expected)
    assert_close(transformers_logits(result.directory), expected)
    assert result.standard
    assert result.changed == 2 * len(targets)
    assert result.lost < 1e-4 < 0.01 < result.effect
    assert {value.dtype for value in tensors_of(result.directory).values()} == {mx.float32}


# mlx-lm's own GLM gives logits that are 1.5e-4 from transformers'.
@pytest.mark.parametrize("kind", sorted({*SAME_NAMES, "mixtral"} - {"glm"}))
def test_other_families_merge_under_their_own_names(tmp_path: Path, kind: str) -> None:
    """Models that transformers wrote, a mixture of experts with an adapter on its attention among them."""
    base = foreign_base(tmp_path / "base", kind)
    names = {"phi": ["q_proj", "dense"], "phi3": ["qkv_proj", "o_proj"]}.get(kind, ["q_proj", "o_proj"])
    adapter = random_adapter(base, tmp_path / "adapter", [f"self_attn.{name}" for name in names])
    result = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert result.standard
    expected = adapted_logits(base, adapter)
    assert_close(mlx_lm_logits(result.directory), expected)
    assert_close(transformers_logits(result.directory), expected)
    assert tensors_of(result.directory).keys() == tensors_of(base).keys()


MIXTURES = {"mixtral": "block_sparse_moe", "qwen3_moe": "mlp", "olmoe": "mlp"}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_merge_one_by_one(tmp_path: Path, kind: str) -> None:
    """mlx-lm stacks the experts of a layer, files have each on its own: under their names both programs open it."""
    base = foreign_base(tmp_path / "base", kind)
    targets = [f"{MIXTURES[kind]}.switch_mlp.{name}_proj" for name in ("gate", "up", "down")]
    adapter = random_adapter(base, tmp_path / "adapter", [*targets, "self_attn.q_proj"])
    result = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert result.standard
    assert result.changed == 2 * (3 * 4 + 1)
    assert tensors_of(result.directory).keys() == tensors_of(base).keys()
    assert_close(mlx_lm_logits(result.directory), adapted_logits(base, adapter))
    assert_close(transformers_logits(result.directory), adapted_logits(base, adapter))
    assert check_unmerge(result.directory, adapter).wrong == ()


@pytest.mark.parametrize("bits", [None, 4])
def test_a_base_with_stacked_experts_stays_mlx_lms(tmp_path: Path, bits: int | None) -> None:
    """As mlx-lm converts a mixture, its experts are stacked in the file: so they are merged, for mlx-lm alone."""
    base = foreign_base(tmp_path / "base", "mixtral")
    model = load_model(base, dtype=None)
    settings = json.loads((base / "config.json").read_text())
    if bits:
        settings["quantization"] = {"group_size": 32, "bits": bits}
        nn.quantize(model, **settings["quantization"])
    (base / "config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    adapter = random_adapter(base, tmp_path / "adapter", ["block_sparse_moe.switch_mlp.down_proj", "self_attn.q_proj"])
    result = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert not result.standard
    assert "for mlx-lm;" in str(result)
    assert_close(mlx_lm_logits(result.directory), adapted_logits(base, adapter))
    assert check_unmerge(result.directory, adapter).wrong == ()


def test_embeddings_and_a_head_can_be_merged(tmp_path: Path) -> None:
    """An adapter on the embedding has its factors the other way round; with tied weights it is the head's too."""
    for tied, targets in ((False, ["model.embed_tokens", "lm_head"]), (True, ["model.embed_tokens"])):
        base = tiny_mistral(tmp_path / f"base-{tied}", tied=tied)
        adapter = random_adapter(base, tmp_path / f"adapter-{tied}", targets)
        result = merge(adapter, tmp_path / f"merged-{tied}", rows=ROWS)
        assert_close(mlx_lm_logits(result.directory), adapted_logits(base, adapter))
        assert_close(transformers_logits(result.directory), adapted_logits(base, adapter))


@pytest.mark.parametrize(
    ("bits", "targets"), [(None, ["self_attn.q_proj", "mlp.down_proj"]), (4, ALL[:1]), (None, ["model.embed_tokens"])]
)
def test_dora_merges_with_its_magnitudes(tmp_path: Path, bits: int | None, targets: list[str]) -> None:
    """m (W + ΔW) / ‖W + ΔW‖ is merged, equal to mlx-lm's own DoRA layer, an embedding's too, and unmerges."""
    base = tiny_mistral(tmp_path / "base", bits=bits)
    adapter = random_adapter(base, tmp_path / "adapter", targets, dora=True)
    result = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert_close(mlx_lm_logits(result.directory), adapted_logits(base, adapter))
    assert check_unmerge(result.directory, adapter).wrong == ()


def test_whole_weights_take_the_place_of_the_base_s(tmp_path: Path) -> None:
    """After full fine-tuning, or of the last layers only, merging puts the trained weights in."""
    base, name = tiny_mistral(tmp_path / "base"), "model.layers.1.mlp.up_proj.weight"
    trained = tensors_of(base)[name] * 2
    (tmp_path / "adapter").mkdir()
    mx.save_safetensors(str(tmp_path / "adapter" / "adapters.safetensors"), {name: trained})
    config = {"model": str(base), "fine_tune_type": "full", "num_layers": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    result = merge(tmp_path / "adapter", tmp_path / "merged", rows=ROWS)
    expected = tensors_of(base) | {name: trained}
    merged = tensors_of(result.directory)
    assert merged.keys() == expected.keys()
    assert all(mx.array_equal(merged[key], expected[key]).item() for key in expected)
    with pytest.raises(ModelError, match="nothing leads back"):
        check_unmerge(result.directory, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_weight_is_rounded_once_to_the_type_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    """Bit for bit the float32 sum, rounded; config.json names the type in both spellings."""
    base = tiny_mistral(tmp_path / "base", dtype=mx.bfloat16)
    adapter = random_adapter(base, tmp_path / "adapter", ["self_attn.q_proj"], scale=3.0)
    result = merge(adapter, tmp_path / "merged", dtype=dtype, rows=ROWS)
    name = "model.layers.1.self_attn.q_proj"
    factors = mx.load(str(adapter / "adapters.safetensors"))
    weight = tensors_of(base)[f"{name}.weight"].astype(mx.float32)
    expected = weight + 3.0 * (factors[f"{name}.lora_a"] @ factors[f"{name}.lora_b"]).T
    merged = tensors_of(result.directory)
    assert mx.array_equal(merged[f"{name}.weight"], expected.astype(getattr(mx, dtype))).item()
    assert {value.dtype for value in merged.values()} == {getattr(mx, dtype)}
    settings = json.loads((result.directory / "config.json").read_text())
    assert settings["torch_dtype"] == settings["dtype"] == dtype == result.kind
    assert check_unmerge(result.directory, adapter).wrong == ()


def test_each_weight_keeps_its_own_type_unless_asked(tmp_path: Path) -> None:
    """The default is the type in the base's files, also where they are mixed."""
    base = tiny_mistral(tmp_path / "base", dtype=mx.bfloat16)
    mixed = tensors_of(base)
    mixed["model.norm.weight"] = mixed["model.norm.weight"].astype(mx.float32)
    mx.save_safetensors(str(base / "model.safetensors"), mixed)
    result = merge(random_adapter(base, tmp_path / "adapter"), tmp_path / "merged", rows=ROWS)
    assert {name: value.dtype for name, value in tensors_of(result.directory).items()} == {
        name: value.dtype for name, value in mixed.items()
    }
    assert main_dtype(mixed) == mx.bfloat16


@pytest.mark.parametrize(("bits", "to"), [(4, None), (8, None), (8, 3)])
def test_a_requantized_merge_is_packed_and_tells_what_it_lost(tmp_path: Path, bits: int, to: int | None) -> None:
    """Packed as the base was or to other bits, opened by mlx-lm, and the loss is that of the logits."""
    base = tiny_mistral(tmp_path / "base", bits=bits)
    adapter = random_adapter(base, tmp_path / "adapter", ALL)
    result = merge(adapter, tmp_path / "merged", requantize=True, bits=to, rows=ROWS)
    effect = measure_effect(base, adapter, ROWS)
    merged = mlx_lm_logits(result.directory)
    alone, adapted = np.array(effect.base), np.array(effect.adapted)
    lost = np.linalg.norm(merged - adapted) / np.linalg.norm(adapted - alone)
    assert result.lost == pytest.approx(lost, rel=1e-3)
    assert 0.001 < lost < 2
    told = str(result).partition("of the adapter's effect is lost.")[2]
    assert told.startswith(" To lose less, leave --requantize out, or take more --bits") == (lost > 0.05)
    settings = json.loads((result.directory / "config.json").read_text())
    assert settings["quantization"] == {"group_size": 32, "bits": to or bits, "mode": "affine"}
    assert tensors_of(result.directory)["lm_head.weight"].shape == (384, 64 * (to or bits) // 32)
    assert not result.standard


def other_packing(directory: Path, packing: dict[str, Any], second: dict[str, Any]) -> Path:
    """A tiny model packed in other ways: layer 1's linear layers as `second`, all other matrices as `packing`."""
    base = tiny_mistral(directory)
    tensors, settings = tensors_of(base), json.loads((base / "config.json").read_text())
    settings["quantization"] = dict(packing)
    for name in [name for name, value in tensors.items() if value.ndim == 2]:
        path = name.removesuffix(".weight")
        how = second if "layers.1" in path else packing
        parts = mx.quantize(tensors.pop(name), **how)
        tensors |= dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=False))
        settings["quantization"] |= {path: how} if how is not packing else {}
    mx.save_safetensors(str(base / "model.safetensors"), tensors)
    (base / "config.json").write_text(json.dumps(settings))
    return base


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8", "affine"])
def test_every_packing_merges_and_is_packed_again(tmp_path: Path, mode: str) -> None:
    """Microscaling formats, and layers packed in two ways: dequantized exactly, or each packed again as it was."""
    size = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8), "affine": (64, 6)}[mode]
    packing = {"group_size": size[0], "bits": size[1], "mode": mode}
    second = {"group_size": 32, "bits": 8, "mode": "affine"}
    base = other_packing(tmp_path / "base", packing, second)
    adapter = random_adapter(base, tmp_path / "adapter", ALL)
    merged = merge(adapter, tmp_path / "merged", rows=ROWS)
    assert_close(mlx_lm_logits(merged.directory), adapted_logits(base, adapter))
    assert check_unmerge(merged.directory, adapter).wrong == ()
    again = merge(adapter, tmp_path / "again", requantize=True, rows=ROWS)
    assert {name: value.shape for name, value in tensors_of(again.directory).items()} == {
        name: value.shape for name, value in tensors_of(base).items()
    }
    before, after = open_base(base, []), open_base(again.directory, [])
    assert len(set(before.packing.values())) == 2
    assert after.packing == before.packing
    assert 0 < again.lost < 1


def test_a_base_that_others_quantized_is_merged_as_mlx_lm_loads_it(tmp_path: Path) -> None:
    """config.json names a method that is not MLX's own: mlx-lm's reading of it is dequantized, or packed again."""
    packing = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    base = other_packing(tmp_path / "base", packing, packing)
    settings = json.loads((base / "config.json").read_text())
    del settings["quantization"]
    (base / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "mxfp4"}}))
    adapter = random_adapter(base, tmp_path / "adapter", ["self_attn.q_proj"])
    merged = merge(adapter, tmp_path / "merged", rows=ROWS).directory
    assert_close(mlx_lm_logits(merged), adapted_logits(base, adapter))
    assert_close(transformers_logits(merged), adapted_logits(base, adapter))
    again = merge(adapter, tmp_path / "again", requantize=True, rows=ROWS).directory
    assert json.loads((again / "config.json").read_text())["quantization"] == packing
    assert np.isfinite(mlx_lm_logits(again)).all()


def test_what_the_adapter_leaves_alone_stays_packed_bit_for_bit(tmp_path: Path) -> None:
    """Packing again what was unpacked need not give the same bits, so only the adapter's layers are."""
    base = tiny_mistral(tmp_path / "base", bits=3)
    adapter = random_adapter(base, tmp_path / "adapter", ["self_attn.q_proj"])
    merged, before = (
        tensors_of(merge(adapter, tmp_path / "merged", requantize=True, rows=ROWS).directory),
        tensors_of(base),
    )
    assert merged.keys() == before.keys()
    differing = {name for name in before if not mx.array_equal(merged[name], before[name]).item()}
    assert {name.rpartition(".")[0] for name in differing} == {
        f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)
    }


def test_a_loss_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    """A small adapter merged into bfloat16 is rounded away: refused with the figure; a higher limit lets it pass."""
    base = tiny_mistral(tmp_path / "base", dtype=mx.bfloat16)
    adapter = random_adapter(base, tmp_path / "adapter", size=0.01)
    with pytest.raises(ModelError, match=r"Merged into bfloat16, \d+ % of the adapter's effect is lost"):
        merge(adapter, tmp_path / "merged", rows=ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    assert merge(adapter, tmp_path / "merged", max_loss=2.0, rows=ROWS).lost > 0.05
    with pytest.raises(ModelError, match="more than --max-loss 1e-07"):
        merge(adapter, tmp_path / "other", dtype="float32", max_loss=1e-7, rows=ROWS)


def test_an_overflow_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """What bfloat16 holds and float16 does not is named; so is what is not finite at all."""
    base = tiny_mistral(tmp_path / "base", dtype=mx.bfloat16)
    weights = tensors_of(base)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e5
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    adapter = random_adapter(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"model\.norm\.weight has 1.*e\+05, which is too large for float16"):
        merge(adapter, tmp_path / "merged", dtype="float16", rows=ROWS)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(base / "model.safetensors"), weights)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite once merged"):
        merge(adapter, tmp_path / "merged", rows=ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_does_nothing_cannot_be_measured(tmp_path: Path) -> None:
    """Untrained, its effect is nothing: exact in float32; in another type the loss has no meaning, which is told."""
    base = tiny_mistral(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", size=0.0)
    assert merge(adapter, tmp_path / "merged", rows=ROWS).lost == 0
    with pytest.raises(ModelError, match="The adapter changes nothing on these rows"):
        merge(adapter, tmp_path / "other", dtype="float16", rows=ROWS)


def test_tokenizer_template_and_generation_config_are_copied_unchanged(tmp_path: Path) -> None:
    """Byte for byte; a stale index and the base's adapter files are not."""
    base = tiny_mistral(tmp_path / "base")
    (base / "generation_config.json").write_text('{"temperature": 0.5}')
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "hf_quant_config.json").write_text("{}")
    merged = merge(random_adapter(base, tmp_path / "adapter"), tmp_path / "merged", rows=ROWS).directory
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    assert {path.name for path in merged.iterdir()} == names | {"config.json", "model.safetensors"}
    assert all((merged / name).read_bytes() == (base / name).read_bytes() for name in names)


def test_large_weights_are_split_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files of bounded size, an index that names each tensor's, and both programs open them."""
    monkeypatch.setattr(saving.save_weights, "__kwdefaults__", {"shard_bytes": 120_000})
    base = tiny_mistral(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    merged = merge(adapter, tmp_path / "merged", rows=ROWS).directory
    files = sorted(path.name for path in merged.glob("model*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(base).keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors_of(base).values())
    assert_close(mlx_lm_logits(merged), adapted_logits(base, adapter))
    assert_close(transformers_logits(merged), adapted_logits(base, adapter))


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen beforehand where the system tells the room, and an OSError in the middle of writing removes the half."""
    base = tiny_mistral(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    usage = saving.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError, match="has room for 1,000 bytes, the model needs"):
        merge(adapter, tmp_path / "merged", rows=ROWS)
    monkeypatch.undo()
    code = (
        "import resource, sys; from pathlib import Path; from mlx_trainer.export.merging.merge import merge\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "merge(Path(sys.argv[1]), Path(sys.argv[2]), rows=[[1, 5, 6]])"
    )
    done = subprocess.run([sys.executable, "-c", code, adapter, tmp_path / "merged"], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_kill_leaves_no_model_folder_and_the_next_merge_clears_up(tmp_path: Path) -> None:
    """Killed when all weights are written, there is nothing under the final name; then the merge runs again."""
    base = tiny_mistral(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter")
    code = (
        "import os, sys; from pathlib import Path; from mlx_trainer.export.merging.merge import merge\n"
        "sys.modules[merge.__module__].measure_logits = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        "merge(Path(sys.argv[1]), Path(sys.argv[2]), rows=[[1, 5, 6]])"
    )
    done = subprocess.run([sys.executable, "-c", code, adapter, tmp_path / "merged"])
    assert done.returncode == -9
    assert not (tmp_path / "merged").exists()
    assert (tmp_path / ".writing-merged" / "model.safetensors").exists()
    merge(adapter, tmp_path / "merged", rows=ROWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path) -> None:
    """Another base, a folder in use, no adapter, PEFT's layout, wrong options: a sentence each, nothing is left."""
    base, small = tiny_mistral(tmp_path / "base"), tiny_mistral(tmp_path / "small", hidden_size=32)
    adapter = random_adapter(base, tmp_path / "adapter")
    packed = random_adapter(tiny_mistral(tmp_path / "packed", bits=4), tmp_path / "other")
    deep = random_adapter(tiny_mistral(tmp_path / "deep", layers=3), tmp_path / "deeper")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_model.safetensors").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    before = sorted(path.name for path in tmp_path.iterdir())
    new = tmp_path / "merged"
    for message, call in {
        "give the base model that": lambda: merge(adapter, new, base=str(small), rows=ROWS),
        "has no model.layers.2": lambda: merge(deep, new, base=str(base), rows=ROWS),
        "full exists already": lambda: merge(adapter, tmp_path / "full", rows=ROWS),
        "holds no adapter in mlx-lm's layout": lambda: merge(base, new, rows=ROWS),
        "it is PEFT's: `mlx-trainer export": lambda: merge(tmp_path / "peft", new, rows=ROWS),
        "--requantize is for a quantized base": lambda: merge(adapter, new, requantize=True, rows=ROWS),
        "--bits 4 is for --requantize": lambda: merge(adapter, new, bits=4, rows=ROWS),
        "--bits is 7": lambda: merge(packed, new, requantize=True, bits=7, rows=ROWS),
        "--max-loss is nan": lambda: merge(adapter, new, max_loss=float("nan"), rows=ROWS),
        "There is no row to measure": lambda: merge(adapter, new, rows=[[]]),
        "dtype 'float8' is unknown": lambda: merge(adapter, new, dtype="float8", rows=ROWS),
    }.items():
        with pytest.raises(ModelError, match=message):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"


def test_the_built_in_rows_are_sentences_of_the_base_s_own_tokenizer(tmp_path: Path) -> None:
    """Where no rows are given, the effect is measured on them."""
    base = tiny_mistral(tmp_path / "base")
    rows = sentence_rows(base)
    tokenizer = load_tokenizer(base)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in rows] == list(SENTENCES)
    adapter = random_adapter(base, tmp_path / "adapter")
    assert merge(adapter, tmp_path / "merged").effect == measure_effect(base, adapter, rows).size
    assert load_model(tmp_path / "merged", dtype=None).layers


def test_memory_holds_one_file_and_one_weight(tmp_path: Path) -> None:
    """Weights are computed and written one after the other: not a copy of the model, nor two, nor three."""
    base = tiny_mistral(tmp_path / "base", hidden_size=256, layers=6)
    adapter = read_adapter(random_adapter(base, tmp_path / "adapter", ALL))
    sizes = [value.nbytes for value in tensors_of(base).values()]
    opened = open_base(base, adapter.targets)
    (tmp_path / "merged").mkdir()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    merge_into(opened.weights, adapter)
    save_weights(tmp_path / "merged", opened.weights, rounding(opened, None, {}), shard_bytes=2 * max(sizes))
    assert mx.get_peak_memory() - before < (2 + 5) * max(sizes) < 0.5 * sum(sizes)
    assert mx.get_active_memory() - before < max(sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_b": None}, r"model\.layers\.0\.self_attn\.q_proj has lora_a; needed are lora_a, lora_b"),
        ({"lora_a": mx.zeros((64, 3))}, "which do not fit each other"),
        ({"lora_a": mx.full((64, 4), float("nan"))}, "not finite|NaN"),
        ({"m": mx.ones((1,))}, "has lora_a, lora_b, m; needed are lora_a, lora_b"),
        ({"extra": mx.ones((1,))}, "extra belongs to no adapter; its tensors end in lora_a, lora_b, m"),
    ],
    ids=["half", "shape", "nan", "magnitudes", "stranger"],
)
def test_a_damaged_adapter_is_refused_by_name(tmp_path: Path, change: dict[str, mx.array | None], message: str) -> None:
    """A factor that is missing, has another shape or is not finite, and tensors that belong to nothing."""
    base = tiny_mistral(tmp_path / "base")
    adapter = random_adapter(base, tmp_path / "adapter", ["self_attn.q_proj"])
    tensors = tensors_of(adapter)
    for factor, value in change.items():
        tensors[f"model.layers.0.self_attn.q_proj.{factor}"] = value
    kept = {name: value for name, value in tensors.items() if value is not None}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), kept)
    with pytest.raises(ModelError, match=message):
        merge(adapter, tmp_path / "merged", rows=ROWS)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("config", ["[]", "{}", '{"lora_parameters": {"rank": 4}}', '{"lora_parameters": 3}', "{"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, config: str) -> None:
    """Whatever stands in adapter_config.json, the error names the file."""
    adapter = random_adapter(tiny_mistral(tmp_path / "base"), tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(config)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        merge(adapter, tmp_path / "merged", rows=ROWS)
