"""Adapters on disk: bit-exact round trips, mlx-lm as the other reader, and files that are refused by name."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from attrs import asdict
from mlx.utils import tree_flatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.adapters import load_adapters, save_adapters
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import inject_lora, trainable, unfreeze
from tests.tiny import tiny_mistral

IDS = mx.array([[1, 17, 300, 45, 9], [1, 5, 6, 350, 2]])
LORA = LoRAConfig(rank=4, alpha=6.0, target_modules=["q_proj", "down_proj"])
FIRST = "model.layers.0.mlp.down_proj.lora_a"


def adapted(directory: Path, lora: LoRAConfig = LORA, *, seed: int = 0, dtype: str = "float32"):  # type: ignore[no-untyped-def]
    """A tiny model whose adapters are all random, so that each of them matters."""
    model = inject_lora(load_model(directory, dtype=dtype), lora, seed=seed)
    generator = np.random.default_rng(seed)
    names = sorted(trainable(model))
    shapes = trainable(model)
    model.load_weights(
        [(name, mx.array(generator.normal(0, 0.1, shapes[name].shape).astype(np.float32))) for name in names],
        strict=False,
    )
    return model


def rewrite(directory: Path, **changes: mx.array | None) -> None:
    """Replace tensors in the adapter file; None removes one. `__` in a name stands for a dot."""
    path = str(directory / "adapters.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    mx.save_safetensors(path, {name: value for name, value in tensors.items() if value is not None})


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_round_trip_is_exact_and_float32(tmp_path: Path, dtype: str) -> None:
    """What is loaded equals what was saved bit for bit, float32 even on a float16 base; the base is not in the file."""
    base = tiny_mistral(tmp_path / "base")
    model, other = adapted(base, dtype=dtype), adapted(base, seed=1, dtype=dtype)
    save_adapters(model, tmp_path / "adapter")
    load_adapters(other, tmp_path / "adapter")
    expected, actual = trainable(model), trainable(other)
    assert expected.keys() == actual.keys() == mx.load(str(tmp_path / "adapter" / "adapters.safetensors")).keys()
    assert all(mx.array_equal(expected[name], actual[name]).item() for name in expected)
    assert {value.dtype for value in actual.values()} == {mx.float32}
    assert mx.array_equal(model(IDS), other(IDS)).item()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "v_proj"],
        ["self_attn.o_proj", "lm_head"],
        ["model.layers.1.mlp.up_proj"],
        ["layers.0.self_attn.k_proj", "mlp.gate_proj"],
    ],
)
def test_mlx_lm_opens_the_adapter(tmp_path: Path, bits: int | None, targets: list[str]) -> None:
    """`mlx_lm.load(model, adapter_path)` adapts the same layers and computes the same logits to 1e-6."""
    from mlx_lm.utils import load

    base = tiny_mistral(tmp_path / "base", bits=bits)
    model = adapted(base, LoRAConfig(rank=4, alpha=6.0, target_modules=targets))
    save_adapters(model, tmp_path / "adapter", base=str(base))
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "adapter"))
    leaves = {name for name, _ in tree_flatten(theirs.parameters()) if name.endswith(("lora_a", "lora_b"))}
    assert leaves == set(trainable(model))
    assert np.abs(np.array(model.eval()(IDS)) - np.array(theirs(IDS))).max() <= 1e-6
    assert np.abs(np.array(model(IDS)) - np.array(load_model(base, dtype="float32")(IDS))).max() > 1e-3


def test_the_configuration_is_mlx_lms(tmp_path: Path) -> None:
    """adapter_config.json holds what mlx-lm requires, alpha = scale * rank for other programs, and our own words."""
    save_adapters(adapted(tiny_mistral(tmp_path / "base")), tmp_path, base="someone/tiny", lora=LORA)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "model": "someone/tiny",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 4,
            "scale": 1.5,
            "dropout": 0.05,
            "keys": ["mlp.down_proj", "self_attn.q_proj"],
            "alpha": 6.0,
        },
        "lora": json.loads(json.dumps(asdict(LORA))),
    }


def test_all_weights_make_the_same_trip(tmp_path: Path) -> None:
    """After full fine-tuning the directory holds all weights, which mlx-lm and this module read alike."""
    from mlx_lm.utils import load

    base, tuned = tiny_mistral(tmp_path / "base"), tiny_mistral(tmp_path / "tuned", seed=9)
    model = unfreeze(load_model(tuned, dtype="float32"))
    save_adapters(model, tmp_path / "full")
    other = unfreeze(load_model(base, dtype="float32"))
    load_adapters(other, tmp_path / "full")
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "full"))
    assert mx.array_equal(other(IDS), model(IDS)).item()
    assert mx.array_equal(theirs(IDS), model(IDS)).item()


REFUSED = {
    "missing": ({FIRST: None}, r"layers\.0\.mlp\.down_proj\.lora_a is missing"),
    "unexpected": ({"extra.lora_a": mx.zeros(3)}, r"extra\.lora_a is not a parameter of this model"),
    "wrong shape": ({FIRST: mx.zeros((128, 8))}, r"down_proj\.lora_a has shape \(128, 8\), the model's has \(128, 4\)"),
    "wrong type": (
        {FIRST: mx.zeros((128, 4), mx.int32)},
        r"down_proj\.lora_a is .*int32, the model's is .*float32\. Load the base",
    ),
    "not finite": (
        {FIRST: mx.full((128, 4), mx.nan)},
        r"NaN or infinity in model\.layers\.0\.mlp\.down_proj\.lora_a \(1 t",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_fit_are_named_and_nothing_changes(tmp_path: Path, case: str) -> None:
    """A missing, unexpected, misshapen, integer or non-finite tensor is a ModelError; the model stays as it was."""
    changes, message = REFUSED[case]
    model = adapted(tiny_mistral(tmp_path / "base"))
    save_adapters(adapted(tmp_path / "base", seed=1), tmp_path)
    rewrite(tmp_path, **changes)
    before = model(IDS)
    with pytest.raises(ModelError, match=message):
        load_adapters(model, tmp_path)
    assert mx.array_equal(model(IDS), before).item()


def test_shorter_floats_are_widened(tmp_path: Path) -> None:
    """An adapter stored in bfloat16 by another program becomes float32 without loss."""
    model = adapted(tiny_mistral(tmp_path / "base"))
    save_adapters(model, tmp_path)
    rewrite(tmp_path, **{FIRST: mx.full((128, 4), 0.375, mx.bfloat16)})
    load_adapters(model, tmp_path)
    assert mx.array_equal(trainable(model)[FIRST], mx.full((128, 4), 0.375)).item()
    assert trainable(model)[FIRST].dtype == mx.float32


def test_full_weights_are_not_narrowed(tmp_path: Path) -> None:
    """Weights trained in float32 are not squeezed into a float16 model in silence."""
    base = tiny_mistral(tmp_path / "base")
    save_adapters(unfreeze(load_model(base, dtype="float32")), tmp_path)
    with pytest.raises(ModelError, match=r"another type \(21 in all\): .*float32, the model's is .*float16"):
        load_adapters(unfreeze(load_model(base, dtype="float16")), tmp_path)


def test_another_scale_is_refused(tmp_path: Path) -> None:
    """Adapters of the same shapes but another alpha would compute something else."""
    base = tiny_mistral(tmp_path / "base")
    save_adapters(adapted(base), tmp_path)
    other = adapted(base, LoRAConfig(rank=4, alpha=8.0, target_modules=LORA.target_modules))
    with pytest.raises(
        ModelError, match=r"has scale 1\.5, but model\.layers\.0\.mlp\.down_proj has 2\.0; set lora\.alpha"
    ):
        load_adapters(other, tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    """An empty folder, a file cut short in its header or in its data, and a configuration that is no JSON."""
    model = adapted(tiny_mistral(tmp_path / "base"))
    with pytest.raises(ModelError, match=r"holds no adapter: adapters\.safetensors is missing"):
        load_adapters(model, tmp_path)
    save_adapters(model, tmp_path)
    path = tmp_path / "adapters.safetensors"
    whole = path.read_bytes()
    for length in (4, 100, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"adapters\.safetensors is (damaged|not a complete safetensors file)"):
            load_adapters(model, tmp_path)
    path.write_bytes(whole)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be read"):
        load_adapters(model, tmp_path)
