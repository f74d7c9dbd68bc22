"""Every member of the family on disk: mlx-lm computes the same, and what is read back is what was written."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from attrs import evolve
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.adapters import load_adapters, lora_of, save_adapters
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import adapted_layers, factors, inject_lora, trainable
from mlx_trainer.models.lora.layout import tensors_of
from tests.models.batches import labelled
from tests.tiny import tiny_mistral, write_tokenizer

IDS = mx.array([[1, 17, 300, 45, 9], [1, 5, 6, 350, 2]])
LORA = LoRAConfig(rank=4, alpha=6.0, dropout=0.25, target_modules=["q_proj", "down_proj"])
ROOT = {"use_rslora": True, "rank_pattern": {"down_proj": 3}}
MEMBERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora and dora": {"init_lora_weights": "olora", "use_dora": True},
    "all linear": {"target_modules": "all-linear"},
    "one block": {"layers_to_transform": [1]},
    "ranks": {"rank_pattern": {r"1\.self_attn\.q_proj": 8, "down_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 5.0}},
    "ranks by their root": ROOT,
    "ranks, dora": {"use_dora": True, **ROOT},
    "ranks, pissa": {"init_lora_weights": "pissa", **ROOT},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "embedding of another rank": {"target_modules": ["embed_tokens", "v_proj"], "rank_pattern": {"embed_tokens": 3}},
    "tied": {"target_modules": ["embed_tokens"]},
}
PACKED = ("lora", "dora", "pissa", "ranks by their root", "embedding and head", "tied")


def tuned(folder: Path, lora: LoRAConfig, seed: int = 0) -> nn.Module:
    """The model after some training: nothing is where it started."""
    model = inject_lora(load_model(folder, dtype="float32"), lora, seed=seed)
    generator = np.random.default_rng(seed)
    for value in trainable(model).values():
        value[:] = value + mx.array(generator.normal(0, 0.1, value.shape).astype(np.float32))
    return model


def everything(model: nn.Module) -> dict[str, mx.array]:
    """What the adapters add, starts that are taken off included."""
    return {
        f"{path}.{name}": value
        for path, one in adapted_layers(model).items()
        for name, value in tensors_of(one).items()
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, int | None], Path]:
    """Tiny Mistrals, tied or not, packed or not."""
    return {
        (tied, bits): tiny_mistral(tmp_path_factory.mktemp("base"), tied=tied, bits=bits)
        for tied in (False, True)
        for bits in (None, 4)
    }


@pytest.mark.parametrize(("name", "bits"), [*((name, None) for name in MEMBERS), *((name, 4) for name in PACKED)])
def test_mlx_lm_computes_the_same_and_it_is_read_back_whole(
    bases: dict[tuple[bool, int | None], Path], tmp_path: Path, name: str, bits: int | None
) -> None:
    """Logits by `mlx_lm.load` to 1e-5; configuration equal, arrays and logits of another model bit for bit."""
    base, lora = bases["tied" in name, bits], evolve(LORA, **MEMBERS[name])
    model = tuned(base, lora)
    save_adapters(model, tmp_path, base=str(base), lora=lora)
    theirs, _ = load(str(base), adapter_path=str(tmp_path))
    logits = model.eval()(IDS)
    assert mx.abs(theirs.eval()(IDS) - logits).max().item() <= 1e-5 * mx.abs(logits).max().item()
    assert mx.abs(load_model(base, dtype="float32")(IDS) - logits).max().item() > 1e-2
    assert lora_of(tmp_path) == lora
    other = tuned(base, lora, seed=1)
    load_adapters(other, tmp_path)
    assert mx.array_equal(other.eval()(IDS), logits).item()
    expected, actual = everything(model), everything(other)
    assert expected.keys() == actual.keys()
    assert all(mx.array_equal(actual[name], value).item() for name, value in expected.items())


@pytest.mark.parametrize("name", ["pissa", "ranks", "ranks by their root", "dora"])
def test_without_its_configuration_it_is_told_from_the_layers(
    bases: dict[tuple[bool, int | None], Path], tmp_path: Path, name: str
) -> None:
    """A model whose adapters nobody described is written and read as well: paths, ranks, scales are the layers' own."""
    base = bases[False, None]
    model = tuned(base, evolve(LORA, **MEMBERS[name]))
    save_adapters(model, tmp_path)
    lora = lora_of(tmp_path)
    assert lora is not None
    other = inject_lora(load_model(base, dtype="float32"), lora)
    load_adapters(other, tmp_path)
    assert list(adapted_layers(other)) == list(adapted_layers(model))
    assert mx.array_equal(other.eval()(IDS), model.eval()(IDS)).item()


def test_the_file_has_one_rank_and_one_scale(bases: dict[tuple[bool, int | None], Path], tmp_path: Path) -> None:
    """Zeros behind the smaller rank, the ratio of scales in `lora_b`, alpha = rank · scale; bit for bit beside it."""
    lora = evolve(LORA, **ROOT)
    model = tuned(bases[False, None], lora)
    save_adapters(model, tmp_path, lora=lora)
    told = json.loads((tmp_path / "adapter_config.json").read_text())["lora_parameters"]
    assert (told["rank"], told["scale"], told["alpha"]) == (4, 6 / 3**0.5, 24 / 3**0.5)
    tensors, layers = mx.load(str(tmp_path / "adapters.safetensors")), adapted_layers(model)
    path, other_path = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    layer, other_layer = layers[path], layers[other_path]
    assert {value.shape[1] for name, value in tensors.items() if name.endswith("lora_a")} == {4}
    assert mx.array_equal(tensors[f"{path}.lora_a"][:, :3], layer.lora_a).item()
    assert not mx.any(tensors[f"{path}.lora_a"][:, 3:]).item()
    assert mx.array_equal(tensors[f"{path}.lora_b"][:3], layer.lora_b).item()
    assert mx.allclose(tensors[f"{other_path}.lora_b"], other_layer.lora_b * 3**0.5 / 2, rtol=1e-6).item()
    (tmp_path / "unscaled.safetensors").unlink()
    other = tuned(bases[False, None], lora, seed=1)
    load_adapters(other, tmp_path)
    assert mx.array_equal(adapted_layers(other)[path].lora_b, layer.lora_b).item()
    assert mx.allclose(adapted_layers(other)[other_path].lora_b, other_layer.lora_b, rtol=3e-7, atol=0).item()


def test_what_stands_beside_is_not_taken_for_other_tensors(
    bases: dict[tuple[bool, int | None], Path], tmp_path: Path
) -> None:
    """Where adapters.safetensors was changed since, it alone counts."""
    lora = evolve(LORA, **ROOT)
    save_adapters(tuned(bases[False, None], lora), tmp_path / "one", lora=lora)
    save_adapters(tuned(bases[False, None], lora, seed=1), tmp_path / "two", lora=lora)
    (tmp_path / "one" / "unscaled.safetensors").replace(tmp_path / "two" / "unscaled.safetensors")
    model = tuned(bases[False, None], lora, seed=2)
    load_adapters(model, tmp_path / "two")
    expected = everything(tuned(bases[False, None], lora, seed=1))
    assert all(
        mx.allclose(value, expected[name], rtol=3e-7, atol=0).item() for name, value in everything(model).items()
    )


def test_more_than_zeros_behind_a_rank_is_refused(bases: dict[tuple[bool, int | None], Path], tmp_path: Path) -> None:
    """A file that says it has rank 3 there, and has more, computes something else."""
    lora = evolve(LORA, **ROOT)
    save_adapters(tuned(bases[False, None], lora), tmp_path, lora=lora)
    path, name = str(tmp_path / "adapters.safetensors"), "model.layers.0.mlp.down_proj.lora_a"
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    mx.save_safetensors(path, tensors | {name: mx.ones(tensors[name].shape)})
    with pytest.raises(ModelError, match=r"down_proj\.lora_a has shape \(128, 4\), the model's has \(128, 3\)"):
        load_adapters(tuned(bases[False, None], lora), tmp_path)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.up_proj"]])
def test_an_adapter_of_mlx_lms_is_opened_and_trained_on(
    bases: dict[tuple[bool, int | None], Path], tmp_path: Path, kind: str, keys: list[str] | None
) -> None:
    """As `mlx_lm.lora` writes it for the last block, without a word of ours: equal logits, a falling loss, and back."""
    base, parameters = bases[False, None], {"rank": 8, "scale": 20.0, "dropout": 0.0}
    parameters |= {} if keys is None else {"keys": keys}
    model = load_model(base, dtype="float32").freeze()
    linear_to_lora_layers(model, 1, parameters, use_dora=kind == "dora")
    for i, value in enumerate(trainable(model).values()):
        value[:] = value + mx.random.normal(value.shape, key=mx.random.key(i)) * 0.01
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trainable(model))
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters, "model": str(base), "seed": 0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    module = CausalLMModule(base, lora=lora_of(tmp_path), dtype="float32", max_seq_length=64)
    module.load(tmp_path)
    expected = model.eval()(IDS)
    assert mx.abs(module.model.eval()(IDS) - expected).max().item() <= 2e-5 * mx.abs(expected).max().item()
    assert len(adapted_layers(module.model)) == (7 if keys is None else 2)

    module.model.train()
    optimizer, losses = module.configure_optimizer(20), []
    step = nn.value_and_grad(module.model, lambda batch: module.training_loss(batch).total)
    for _ in range(3):
        loss, found = step(labelled())
        optimizer.update(module.model, found)
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    module.save(tmp_path / "on")
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "on"))
    ours = module.model.eval()(IDS)
    assert mx.abs(theirs.eval()(IDS) - ours).max().item() <= 2e-5 * mx.abs(ours).max().item()


def test_a_start_that_is_taken_off_does_not_fit_a_plain_adapter(
    bases: dict[tuple[bool, int | None], Path], tmp_path: Path
) -> None:
    """Of the same rank as told, but another function: refused both ways, with both shapes."""
    base = bases[False, None]
    pissa = evolve(LORA, init_lora_weights="pissa")
    save_adapters(tuned(base, pissa), tmp_path / "pissa", lora=pissa)
    save_adapters(tuned(base, LORA), tmp_path / "plain", lora=LORA)
    with pytest.raises(ModelError, match=r"lora_a has shape \(128, 8\), the model's has \(128, 4\)"):
        load_adapters(tuned(base, LORA), tmp_path / "pissa")
    model = tuned(base, pissa)
    before = model.eval()(IDS)
    with pytest.raises(ModelError, match=r"lora_a has shape \(128, 4\), the model's has \(128, 8\)"):
        load_adapters(model, tmp_path / "plain")
    assert mx.array_equal(model(IDS), before).item()
    a, _ = factors(adapted_layers(model)["model.layers.0.mlp.down_proj"])
    assert a.shape == (128, 8)


ENDLESS = [{"target_modules": r"(\w+\.?)+!"}, {"alpha_pattern": {r"(\w+\.?)+!": 2.0}}]


@pytest.mark.parametrize("section", [{"rank": 0}, {"ranks": 4}, [], {"rank_pattern": {"(": 2}}, *ENDLESS])
def test_a_section_that_is_no_configuration_is_refused(
    bases: dict[tuple[bool, int | None], Path], tmp_path: Path, section: Any
) -> None:
    """By the path of the file, in reading the configuration and in loading alike."""
    model = tuned(bases[False, None], LORA)
    save_adapters(model, tmp_path, lora=LORA)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(told | {"lora": section}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: is not the configuration of an mlx-lm adapter"):
        lora_of(tmp_path)
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read as an adapter's configuration"):
        load_adapters(model, tmp_path)


def mixtral(folder: Path, bits: int | None) -> Path:
    """A Mixtral of two blocks with four experts, packed or not."""
    from mlx_lm.models.mixtral import Model, ModelArgs

    sizes: dict[str, Any] = {
        "model_type": "mixtral",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "rms_norm_eps": 1e-5,
    }
    model, packing = Model(ModelArgs(**sizes)), {"group_size": 32, "bits": bits}
    for i, value in enumerate(trainable(model).values()):
        value[:] = mx.random.normal(value.shape, key=mx.random.key(i)) * value.shape[-1] ** -0.5
    if bits is not None:
        nn.quantize(model, **packing)
        sizes |= {"quantization": packing}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(sizes))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "switch_mlp.up_proj", "lm_head"]])
def test_adapters_of_experts_make_the_same_trip(tmp_path: Path, targets: Any, bits: int | None) -> None:
    """Experts of a smaller rank and another scale among them; every adapter has a gradient, and the loss falls."""
    base = mixtral(tmp_path / "base", bits)
    ranks = {} if targets == ["gate"] else {"up_proj": 3}
    lora = LoRAConfig(rank=4, alpha=6.0, dropout=0.0, target_modules=targets, rank_pattern=ranks, use_rslora=True)
    model = tuned(base, lora)
    save_adapters(model, tmp_path / "adapter", lora=lora)
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "adapter"))
    logits = model.eval()(IDS)
    assert mx.abs(theirs.eval()(IDS) - logits).max().item() <= 1e-5 * mx.abs(logits).max().item()
    module = CausalLMModule(base, lora=lora_of(tmp_path / "adapter"), dtype="float32", max_seq_length=64)
    module.load(tmp_path / "adapter")
    assert mx.array_equal(module.model.eval()(IDS), logits).item()
    step = nn.value_and_grad(module.model, lambda batch: module.training_loss(batch).total)
    loss, found = step(labelled())
    assert all(mx.any(value).item() for _, value in tree_flatten(found))
    optimizer = optimizers.SGD(1e-3)
    optimizer.update(module.model, found)
    assert step(labelled())[0].item() < loss.item()
