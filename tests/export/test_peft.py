"""PEFT's layout without PEFT: what is written, how the check sees what is wrong, and what is refused by name."""

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.export.checking import logits_of, sample_ids
from mlx_trainer.export.low_rank import Adapter, LowRank
from mlx_trainer.export.mlx_layout import read_mlx, write_mlx
from mlx_trainer.export.peft import from_peft, layout, read_peft, to_peft, write_peft
from mlx_trainer.export.peft.config import PLAIN, describe
from mlx_trainer.models import ModelError
from tests.export.adapters import config_of, reconfigure, rewrite, tensors, write_adapter
from tests.tiny import VOCABULARY, tiny_mistral

LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.1, target_modules=["q_proj", "v_proj"])
FIRST = "base_model__model__model__layers__0__self_attn__q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_mistral(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(base, tmp_path / "adapter", LORA)


@pytest.fixture
def exported(tmp_path: Path, adapter: Path) -> Path:
    return to_peft(adapter, tmp_path / "peft").directory


def test_the_layout_is_pefts(adapter: Path, exported: Path, base: Path) -> None:
    """Transposes under PEFT's names, and a configuration that says the same in PEFT's words."""
    ours, theirs = tensors(adapter / "adapters.safetensors"), tensors(exported / "adapter_model.safetensors")
    assert len(theirs) == len(ours) == 8
    for name, value in ours.items():
        path, _, leaf = name.rpartition(".")
        kept = theirs[f"base_model.model.{path}.lora_{leaf[-1].upper()}.weight"]
        assert np.array_equal(np.array(kept), np.array(value).T)
    told = {name: value for name, value in config_of(exported).items() if value not in (None, {})}
    assert told == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": ["q_proj", "v_proj"],
    }


def test_there_and_back_is_exact(tmp_path: Path, adapter: Path, exported: Path) -> None:
    """Every tensor bit for bit, and mlx-lm's configuration as it was."""
    from_peft(exported, tmp_path / "back")
    before, after = tensors(adapter / "adapters.safetensors"), tensors(tmp_path / "back" / "adapters.safetensors")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    back = config_of(tmp_path / "back")
    assert {name: back[name] for name in ("model", "fine_tune_type", "num_layers", "lora_parameters")} == {
        name: value for name, value in config_of(adapter).items() if name != "lora"
    }


def test_what_was_found_is_told_in_one_line(tmp_path: Path, adapter: Path) -> None:
    """The folder, the layers, and how far the logits are apart; without a base that it was not checked."""
    line = str(to_peft(adapter, tmp_path / "a"))
    assert line.startswith(f"PEFT adapter in {tmp_path / 'a'}, 4 layers: logits differ by at most ")
    assert line.endswith(" of their size), 100 % same first guess")
    unchecked = str(to_peft(adapter, tmp_path / "b", check=False))
    assert unchecked.endswith("4 layers: not checked: give the base model to compare the logits")


@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (8, "float32"), (None, "float16"), (4, "bfloat16")])
def test_packed_and_16_bit_bases_are_checked_too(tmp_path: Path, bits: int | None, dtype: str) -> None:
    """The same operations on both sides: what is left is far below the adapter's effect."""
    base = tiny_mistral(tmp_path / "base", bits=bits)
    write_adapter(base, tmp_path / "adapter", LORA)
    done = to_peft(tmp_path / "adapter", tmp_path / "peft", dtype=dtype)
    assert done.difference is not None
    assert done.difference.relative <= 1e-6


@pytest.mark.parametrize("base_is", ["known", "unknown"])
def test_an_alpha_that_is_no_whole_number_keeps_its_effect(tmp_path: Path, base: Path, base_is: str) -> None:
    """scale · rank = 6.6 becomes lora_alpha 7, and lora_B is 6.6 / 7 of what it was."""
    adapter = write_adapter(base, tmp_path / "adapter", LoRAConfig(rank=4, alpha=6.6, target_modules=["q_proj"]))
    to_peft(adapter, tmp_path / "peft", check=base_is == "known")
    name = "model.layers.1.self_attn.q_proj"
    ours = tensors(adapter / "adapters.safetensors")[f"{name}.lora_b"]
    theirs = tensors(tmp_path / "peft" / "adapter_model.safetensors")[f"base_model.model.{name}.lora_B.weight"]
    assert config_of(tmp_path / "peft")["lora_alpha"] == 7
    assert np.allclose(np.array(theirs).T, np.array(ours) * 6.6 / 7, rtol=1e-6)


@pytest.mark.parametrize("wrong", ["not transposed", "scale", "sign", "layer"])
def test_the_check_sees_what_no_shape_shows(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """A square factor not transposed, another scale, a sign or two layers in each other's place; nothing is left."""
    square = LoRAConfig(rank=64, alpha=64.0, target_modules=["q_proj", "o_proj"])
    adapter = write_adapter(base, tmp_path / "adapter", square)
    right = layout.peft_tensors

    def changed(path: str, layer: LowRank, rest: float) -> dict[str, mx.array]:
        found = right(path, layer, rest * {"scale": 1.001, "sign": -1.0}.get(wrong, 1.0))
        if wrong == "not transposed":
            found["lora_A.weight"] = found["lora_A.weight"].T
        if wrong == "layer" and ".0." in path:
            found["lora_A.weight"] = found["lora_A.weight"][::-1]
        return found

    monkeypatch.setattr(layout, "peft_tensors", changed)
    with pytest.raises(ModelError, match=r"does not compute the same: logits differ by at most .* Nothing was left"):
        to_peft(adapter, tmp_path / "peft")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def drawn(rank: int, *, scale: float, seed: int, m: bool = False) -> LowRank:
    """A random adapter of a 64 x 64 layer."""
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(64, rank)), generator.normal(size=(rank, 64))
    magnitude = mx.array(np.abs(generator.normal(size=64)).astype(np.float32)) if m else None
    return LowRank(mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32)), scale, magnitude)


def delta(layer: LowRank) -> np.ndarray:
    """What the layer adds to its weight, transposed."""
    return layer.scale * np.array(layer.a) @ np.array(layer.b)


@pytest.mark.parametrize("rslora", [False, True])
def test_several_ranks_and_scales_go_both_ways(tmp_path: Path, rslora: bool) -> None:
    """PEFT's patterns name the layers that differ; mlx-lm's file has one rank and scale, and the same products."""
    q, o = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"
    layers = {
        q.format(0): drawn(4, scale=2.0, seed=0),
        q.format(1): drawn(4, scale=2.0, seed=1),
        o.format(0): drawn(9, scale=1.0, seed=2),
        o.format(1): drawn(4, scale=0.75, seed=3),
    }
    (tmp_path / "peft").mkdir()
    (tmp_path / "mlx").mkdir()
    (tmp_path / "again").mkdir()
    write_peft(Adapter(layers, "base", use_rslora=rslora), tmp_path / "peft")
    config = config_of(tmp_path / "peft")
    assert (config["r"], config["rank_pattern"]) == (4, {o.format(0): 9})
    assert config["alpha_pattern"] == ({o.format(0): 3, o.format(1): 2} if rslora else {o.format(0): 9, o.format(1): 3})
    read, _ = read_peft(tmp_path / "peft")
    write_mlx(read, tmp_path / "mlx")
    padded = tensors(tmp_path / "mlx" / "adapters.safetensors")
    assert {padded[f"{path}.lora_a"].shape for path in layers} == {(64, 9)}
    write_peft(read_mlx(tmp_path / "mlx"), tmp_path / "again")
    again, _ = read_peft(tmp_path / "again")
    for path, layer in layers.items():
        assert [found.layers[path].rank for found in (read, again)] == [layer.rank] * 2
        for found in (read, read_mlx(tmp_path / "mlx"), again):
            assert np.allclose(delta(found.layers[path]), delta(layer), rtol=1e-5, atol=1e-5)


def test_plain_says_all_in_one_rank_and_alpha(tmp_path: Path, base: Path) -> None:
    """What only reads r and lora_alpha gets the same products; without it, that it would not is told."""
    q, o = ("model.layers.0.self_attn." + name for name in ("q_proj", "o_proj"))
    layers = {q: drawn(4, scale=2.0, seed=0), o: drawn(9, scale=0.7, seed=1)}
    for folder in ("adapter", "rslora"):
        (tmp_path / folder).mkdir()
    write_mlx(Adapter(layers, str(base)), tmp_path / "adapter")
    done = to_peft(tmp_path / "adapter", tmp_path / "uneven")
    assert done.notes[0].startswith("It has rsLoRA, or ranks or alphas of single layers")
    assert config_of(tmp_path / "uneven")["rank_pattern"] == {q: 4}
    for rslora in (False, True):
        write_mlx(Adapter(layers, str(base), use_rslora=rslora), tmp_path / "rslora")
        output = tmp_path / f"plain{rslora}"
        assert to_peft(tmp_path / "rslora", output, plain=True).notes == ()
        config, written = config_of(output), tensors(output / "adapter_model.safetensors")
        assert [config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora")] == [{}, {}, False]
        for path, layer in layers.items():
            a, b = (np.array(written[f"base_model.model.{path}.lora_{leaf}.weight"]) for leaf in "AB")
            assert np.allclose(config["lora_alpha"] / config["r"] * (b @ a).T, delta(layer), rtol=1e-5, atol=1e-5)


def test_both_spellings_of_the_magnitude_are_read(tmp_path: Path, base: Path) -> None:
    """PEFT has written `lora_magnitude_vector` with and without `.weight`."""
    folder = tmp_path / "peft"
    folder.mkdir()
    names = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    layers = {name: drawn(2, scale=2.0, seed=seed, m=True) for seed, name in enumerate(names)}
    write_peft(Adapter(layers, str(base)), folder)
    (tmp_path / "plain").mkdir()
    first = from_peft(folder, tmp_path / "plain")
    magnitude = tensors(folder / "adapter_model.safetensors")[f"base_model.model.{names[0]}.lora_magnitude_vector"]
    changes = {f"{FIRST}__lora_magnitude_vector": None, f"{FIRST}__lora_magnitude_vector__weight": magnitude}
    rewrite(folder / "adapter_model.safetensors", **changes)
    second = from_peft(folder, tmp_path / "spelt")
    assert first.difference == second.difference is not None
    read = [tensors(tmp_path / name / "adapters.safetensors") for name in ("plain", "spelt")]
    assert all(mx.array_equal(read[0][name], read[1][name]).item() for name in read[0])
    assert read[0].keys() == read[1].keys()
    assert config_of(tmp_path / "plain")["fine_tune_type"] == "dora"


LINEARS = [f"model.layers.{block}.self_attn.{name}" for block in range(3) for name in ("q_proj", "o_proj")] + [
    "lm_head"
]
TARGETS: dict[str, tuple[list[str], list[str], list[int] | None]] = {
    "every block": ([name for name in LINEARS if "q_proj" in name], ["q_proj"], None),
    "some blocks": ([LINEARS[0], LINEARS[4]], ["q_proj"], [0, 2]),
    "and the head": ([LINEARS[4], LINEARS[5], "lm_head"], ["o_proj", "q_proj", "lm_head"], [2]),
    "no pattern": ([LINEARS[0], LINEARS[3]], [LINEARS[0], LINEARS[3]], None),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_targets_are_exactly_the_layers(case: str) -> None:
    """In as few words as PEFT's rules allow; where the base is not at hand its blocks are always listed."""
    layers, names, blocks = TARGETS[case]
    found = describe(layers, LINEARS)
    assert (found["target_modules"], found["layers_to_transform"]) == (names, blocks)
    assert found["layers_pattern"] == (None if blocks is None else ["layers"])
    unknown = describe(layers, None)
    assert (unknown["layers_to_transform"] is None) == (case == "no pattern")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "has peft_type 'LOHA'; only LORA"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "has fan_in_fan_out True, which mlx-lm has nothing for"),
    "use_qalora": ({"use_qalora": True}, "has use_qalora True"),
    "megatron": ({"megatron_config": {"a": 1}}, "has megatron_config"),
    "no rank": ({"r": "4"}, r"has rank '4' for model\.layers\.0.*; it must be a whole number"),
    "another rank": ({"r": 8}, r"has rank 8 for model\.layers\.0\.self_attn\.q_proj, its tensors have 4"),
    "no alpha": ({"lora_alpha": None}, "has lora_alpha None"),
    "untargeted": ({"target_modules": ["v_proj"]}, r"has tensors of model\.layers\.0\.self_attn\.q_proj, which"),
    "other blocks": ({"layers_to_transform": [0]}, r"has tensors of model\.layers\.1\..*\(2 such layers\)"),
    "endless pattern": ({"rank_pattern": {r"(\w+\.?)+!": 4}}, r"has in rank_pattern '.*', which could take for ever"),
    "broken pattern": ({"alpha_pattern": {"q_proj(": 4}}, r"has in alpha_pattern 'q_proj\(', which is no regular expr"),
    "list for a pattern": ({"rank_pattern": [4]}, r"has rank_pattern \[4\]; it must be names with numbers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_cannot_be_carried_are_refused_by_name(tmp_path: Path, exported: Path, case: str) -> None:
    """Each names the option, and nothing is written."""
    changes, message = REFUSED[case]
    reconfigure(exported, **changes)
    with pytest.raises(ModelError, match=message):
        from_peft(exported, tmp_path / "back")
    assert not (tmp_path / "back").exists()


DAMAGED: dict[str, tuple[dict[str, mx.array | None], str]] = {
    "half of a layer": ({f"{FIRST}__lora_B__weight": None}, r"q_proj has lora_a; needed are lora_a, lora_b"),
    "belongs to nothing": (
        {"base_model__model__lm_head__weight": mx.zeros((2, 2))},
        r"lm_head\.weight belongs to no LoRA",
    ),
    "a name beyond all models'": (
        {f"base_model__model__{'a.' * 99}lora_A__weight": mx.ones((4, 64))},
        r"a\.a\.a belongs to no LoRA layer",
    ),
    "other inputs": (
        {f"{FIRST}__lora_A__weight": mx.ones((4, 32))},
        r"goes from 32 to 64 in .*q_proj, .* from 64 to 64",
    ),
    "no layer": ({f"{FIRST}__lora_A__weight": mx.ones((4, 4, 64))}, "is a layer of experts"),
    "factors apart": (
        {f"{FIRST}__lora_A__weight": mx.ones((5, 64))},
        r"lora_a \(64, 5\), lora_b \(4, 64\), which do not fit",
    ),
    "magnitudes": (
        {f"{FIRST}__lora_magnitude_vector": mx.ones(64)},
        "has lora_a, lora_b, m; needed are lora_a, lora_b",
    ),
    "integers": ({f"{FIRST}__lora_A__weight": mx.ones((4, 64), mx.int32)}, "int32, which is no float"),
    "not finite": ({f"{FIRST}__lora_A__weight": mx.full((4, 64), mx.inf)}, "holds NaN or infinity in base_model"),
    "base weight": (
        {"base_model__model__lm_head__base_layer__weight": mx.ones((400, 64))},
        "has a base weight of lm_head that is not the base's",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, exported: Path, case: str) -> None:
    """Missing, surplus, misshapen, integer and non-finite ones; and nothing is written."""
    changes, message = DAMAGED[case]
    rewrite(exported / "adapter_model.safetensors", **changes)
    with pytest.raises(ModelError, match=message):
        from_peft(exported, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_broken_files_and_pickles_are_not_opened(tmp_path: Path, exported: Path) -> None:
    """A header with wrong offsets, a file cut short, a configuration that is none, and PyTorch's own format."""
    path, config = exported / "adapter_model.safetensors", exported / "adapter_config.json"
    whole, text = path.read_bytes(), config.read_text()
    for damaged in (whole[:-100], whole.replace(b"[0,1024]", b"[0,9999]"), b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors is not a complete safetensors file"):
            from_peft(exported, tmp_path / "back")
    path.unlink()
    with pytest.raises(ModelError, match=r"holds no adapter: adapter_model\.safetensors is missing"):
        from_peft(exported, tmp_path / "back")
    (exported / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"adapter_model\.bin is a pickle, which can run code and is not opened"):
        from_peft(exported, tmp_path / "back")
    for wrong in ("[1]", "{}", text[:20]):
        config.write_text(wrong)
        (exported / "adapter_model.bin").unlink(missing_ok=True)
        with pytest.raises(ModelError, match=r"adapter_config\.json (is not the configuration|cannot be read)"):
            from_peft(exported, tmp_path / "back")


ODD = (None, True, 0, -1, 1e308, 10**400, "q_proj", "", [], [1, None], {"a": []}, {"q_proj": "x"}, {"": 1})


@pytest.mark.parametrize("layout_of", ["peft", "mlx"])
def test_odd_values_anywhere_are_refused_or_harmless(
    tmp_path: Path, adapter: Path, exported: Path, layout_of: str
) -> None:
    """Every option with values of every other kind: one sentence or a written folder, never another error."""
    folder, convert = (exported, from_peft) if layout_of == "peft" else (adapter, to_peft)
    right, refused = config_of(folder), []
    options = [*right, *PLAIN] if layout_of == "peft" else [*right, "lora"]
    for number, (option, value) in enumerate(itertools.product(options, ODD)):
        reconfigure(folder, **{**right, option: value})
        try:
            convert(folder, tmp_path / f"{layout_of}{number}", "some/base", check=False)
        except ModelError as error:
            refused.append(str(error))
    assert len(refused) > len(options)
    assert [message for message in refused if str(folder) not in message] == []


def test_nothing_is_overwritten(tmp_path: Path, adapter: Path) -> None:
    """A folder with something in it stays as it is; an empty one is taken."""
    (tmp_path / "peft").mkdir()
    to_peft(adapter, tmp_path / "peft")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "peft").iterdir())
    with pytest.raises(ModelError, match="name a new folder"):
        to_peft(adapter, tmp_path / "peft")
    assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "peft").iterdir()) == before


def test_an_adapter_of_another_base_is_told_apart(tmp_path: Path, adapter: Path) -> None:
    """Fewer blocks, or other sizes, are named before anything is written."""
    small = tiny_mistral(tmp_path / "small", layers=1)
    with pytest.raises(ModelError, match=r"has model\.layers\.1\.self_attn\.q_proj, which is no linear layer"):
        to_peft(adapter, tmp_path / "peft", small)
    wide = tiny_mistral(tmp_path / "wide", hidden_size=32)
    with pytest.raises(
        ModelError, match=r"goes from 64 to 64 in model\.layers\.0\.self_attn\.q_proj, .*wide from 32 to 32"
    ):
        to_peft(adapter, tmp_path / "peft", wide)


def test_a_base_that_nobody_named_is_asked_for(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Both layouts say whose adapter it is; a name that is not at hand is written and told to be unchecked."""
    reconfigure(adapter, model=None)
    with pytest.raises(ModelError, match=r"names no base model.*\(--model\)"):
        to_peft(adapter, tmp_path / "peft")
    reconfigure(adapter, model="someone/not-here")
    done = to_peft(adapter, tmp_path / "peft")
    assert done.difference is None
    assert config_of(tmp_path / "peft")["base_model_name_or_path"] == "someone/not-here"
    assert config_of(tmp_path / "peft")["layers_to_transform"] == [0, 1]
    assert to_peft(adapter, tmp_path / "checked", base).difference is not None


def test_an_embedding_that_is_the_head_too_is_refused(tmp_path: Path) -> None:
    """mlx-lm adapts the head with it, PEFT does not."""
    tied = tiny_mistral(tmp_path / "base", tied=True)
    (tmp_path / "adapter").mkdir()
    generator = np.random.default_rng(0)
    a, b = (mx.array(generator.normal(size=shape).astype(np.float32)) for shape in ((384, 2), (2, 64)))
    write_mlx(Adapter({"model.embed_tokens": LowRank(a, b, 1.0)}, str(tied)), tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"model\.embed_tokens is the model's head too"):
        to_peft(tmp_path / "adapter", tmp_path / "peft")


def test_layers_that_transformers_holds_otherwise_are_refused_by_name() -> None:
    """Routers and experts of a mixture, halves of a product; a text model within another has a prefix there."""
    from mlx_trainer.export.peft.names import to_mlx, to_transformers

    for path in (
        "model.layers.0.mlp.gate",
        "model.layers.0.block_sparse_moe.switch_mlp.up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ):
        with pytest.raises(ModelError, match="is part of a mixture of experts"):
            to_transformers(path)
    with pytest.raises(ModelError, match=r"is half of transformers' kv_b_proj"):
        to_transformers("model.layers.0.self_attn.embed_q")
    inner = "language_model.model.layers.0.self_attn.q_proj"
    assert to_transformers(inner) == "model.language_model.layers.0.self_attn.q_proj"
    both = [to_transformers(inner), to_transformers("language_model.lm_head")]
    assert to_mlx(both) == {both[0]: inner, "lm_head": "language_model.lm_head"}
    assert to_mlx(["lm_head"]) == {"lm_head": "lm_head"}


def test_an_adapter_of_peft_is_used_as_one_of_ours_is(base: Path, adapter: Path, exported: Path) -> None:
    """`--adapter` takes either folder: the same logits bit for bit, which are not the base's."""
    from mlx_trainer.config import ModelConfig
    from mlx_trainer.trained import trained_module

    model = ModelConfig(model_name=str(base), dtype="float32", max_seq_length=64)
    folders, ids = (str(adapter), str(exported), None), sample_ids(VOCABULARY)
    ours, theirs, plain = (logits_of(trained_module(model, folder), ids) for folder in folders)
    assert mx.array_equal(ours, theirs).item()
    assert mx.abs(ours - plain).max().item() > 0.1


def test_the_command_writes_and_tells(tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`export` there and back prints its line each time; what is wrong ends with 2 and one sentence."""
    from mlx_trainer import cli

    there, back = str(tmp_path / "peft"), str(tmp_path / "back")
    assert cli.main(["export", str(adapter), there, "--to", "peft", "--dtype", "float16"]) == 0
    assert capsys.readouterr().out.startswith(f"PEFT adapter in {there}, 4 layers: logits differ by at most ")
    assert cli.main(["export", there, back, "--to", "mlx", "--no-check"]) == 0
    assert capsys.readouterr().out.startswith(f"mlx-lm adapter in {back}, 4 layers: not checked")
    assert cli.main(["export", there, back, "--to", "mlx"]) == 2
    assert capsys.readouterr().err == f"mlx-trainer: {back} exists already; name a new folder, or remove it first.\n"
    assert cli.main(["export", there, str(tmp_path / "x"), "--to", "gguf"]) == 2
    assert "invalid choice: 'gguf'" in capsys.readouterr().err
    assert cli.main(["export", there, str(tmp_path / "x"), "--to", "peft"]) == 2
    assert "is a PEFT adapter already" in capsys.readouterr().err
    assert cli.main(["export", there, str(tmp_path / "x"), "--to", "mlx", "--plain"]) == 2
    assert "--plain is for --to peft" in capsys.readouterr().err
    assert cli.main(["export", str(adapter), str(tmp_path / "plain"), "--to", "peft", "--plain"]) == 0
