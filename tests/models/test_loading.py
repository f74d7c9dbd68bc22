"""Loading folders in Hugging Face layout: the same numbers whoever wrote them, and errors that name what is wrong."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model, load_tokenizer
from mlx_trainer.state import random_state
from tests.tiny import tiny_mistral

IDS = mx.array([[1, 17, 300, 45, 9, 122, 80, 64], [1, 5, 6, 7, 350, 351, 352, 2]])


def edit(directory: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("rope_theta", [10_000.0, 1_000_000.0])
def test_a_transformers_5_config_has_the_right_rope_base(tmp_path: Path, rope_theta: float) -> None:
    """transformers 5 writes the base under `rope_parameters`; the logits equal those of a transformers 4 config."""
    old = tiny_mistral(tmp_path / "old", rope_theta=rope_theta)
    new = tiny_mistral(tmp_path / "new", rope_theta=rope_theta, transformers5=True)
    assert "rope_theta" not in json.loads((new / "config.json").read_text())
    models = [load_model(directory, dtype="float32") for directory in (old, new)]
    assert mx.array_equal(models[0](IDS), models[1](IDS)).item()
    assert models[1].args.rope_theta == rope_theta


def test_rope_scaling_of_transformers_5_is_used(tmp_path: Path) -> None:
    """A scaled rope under `rope_parameters` becomes mlx-lm's `rope_scaling`."""
    directory = tiny_mistral(tmp_path)
    edit(directory, rope_theta=None, rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0})
    rope = load_model(directory).layers[0].self_attn.rope
    assert (rope.base, rope.scale) == (5e5, 0.25)


@pytest.mark.parametrize("tied", [True, False])
def test_an_absent_tie_key_follows_the_weights(tmp_path: Path, tied: bool) -> None:
    """Without `tie_word_embeddings` a model is tied exactly where the file holds no head."""
    directory = tiny_mistral(tmp_path, tied=tied)
    expected = load_model(directory, dtype="float32")(IDS)
    edit(directory, tie_word_embeddings=None)
    model = load_model(directory, dtype="float32")
    assert model.args.tie_word_embeddings is tied
    assert mx.array_equal(model(IDS), expected).item()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_parameters_have_the_asked_dtype_and_the_random_state_stays(tmp_path: Path, dtype: str) -> None:
    """Every parameter is of the asked type, the logits too, and loading draws nothing from MLX's random state."""
    directory, before = tiny_mistral(tmp_path), random_state()
    model = load_model(directory, dtype=dtype)
    assert {str(value.dtype) for _, value in tree_flatten(model.parameters())} == {f"mlx.core.{dtype}"}
    assert str(model(IDS).dtype) == f"mlx.core.{dtype}"
    assert random_state() == before


def test_packed_weights_stay_as_they_are(tmp_path: Path) -> None:
    """A 4-bit model keeps its packed numbers bit for bit; its scales and its activations have the asked type."""
    directory = tiny_mistral(tmp_path, bits=4)
    stored = mx.load(str(directory / "model.safetensors"))
    model = load_model(directory, dtype="bfloat16")
    for name, value in tree_flatten(model.parameters()):
        packed = value.dtype == mx.uint32
        assert mx.array_equal(value, stored[name] if packed else stored[name].astype(mx.bfloat16)).item(), name
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.uint32
    assert model(IDS).dtype == mx.bfloat16


def without(name: str, directory: Path) -> None:
    """Delete a file."""
    (directory / name).unlink()


def without_tensor(directory: Path) -> None:
    """Take one tensor out of the weights."""
    path = str(directory / "model.safetensors")
    tensors = dict(mx.load(path))
    mx.eval(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(path, tensors)


def cut_short(directory: Path) -> None:
    """Keep the first 5000 bytes of the weights."""
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def with_missing_shard(directory: Path) -> None:
    """Write an index that names a file which is not there."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BROKEN = {
    "no config": (
        lambda d: without("config.json", d),
        r"has no config\.json, so it is no model folder; it holds model",
    ),
    "adapter folder": (
        lambda d: (without("config.json", d), (d / "adapter_config.json").write_text("{}")),
        "it holds adapters: give their base model",
    ),
    "broken config": (lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read as JSON"),
    "no model type": (lambda d: edit(d, model_type=None), r'config\.json names no "model_type"'),
    "unknown type": (
        lambda d: edit(d, model_type="mistrall"),
        'mlx-lm has no architecture for model_type "mistrall". Did you mean mistral',
    ),
    "remote code": (lambda d: edit(d, model_file="own.py"), r"runs its own code \(own\.py\).*trust_remote_code=True"),
    "no weights": (
        lambda d: without("model.safetensors", d),
        r"has no weights \(model\*\.safetensors\); it holds config",
    ),
    "missing tensor": (without_tensor, r"do not fit its config\.json: Missing 1 parameters: .*layers\.1\.mlp\.up_proj"),
    "wrong shape": (
        lambda d: edit(d, intermediate_size=96),
        r"do not fit .* Expected shape \(\d+, \d+\) but received shape \(\d+, \d+\) for parameter model\.layers",
    ),
    "cut short": (cut_short, r"safetensors"),
    "missing shard": (with_missing_shard, "lacks 1 of its 2 weight files: model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_told_apart(tmp_path: Path, case: str) -> None:
    """Each way in which a model folder can be incomplete gives a ModelError that names the file or tensor."""
    breaks, message = BROKEN[case]
    breaks(tiny_mistral(tmp_path))
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_own_code_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    """With `trust_remote_code` the architecture of `model_file` is used."""
    directory = tiny_mistral(tmp_path)
    (directory / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\nModel.trusted = True\n")
    edit(directory, model_file="own.py")
    try:
        assert load_model(directory, trust_remote_code=True).trusted
    finally:
        from mlx_lm.models.llama import Model

        del Model.trusted


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    """A folder without tokenizer files, and one whose tokenizer.json is no tokenizer, say so."""
    directory = tiny_mistral(tmp_path)
    (directory / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelError, match=r"The tokenizer in .* cannot be read"):
        load_tokenizer(directory)
    without("tokenizer.json", directory)
    without("tokenizer_config.json", directory)
    with pytest.raises(
        ModelError, match=r"has no tokenizer \(tokenizer\.json\); it holds config\.json, model\.safetensors"
    ):
        load_tokenizer(directory)
