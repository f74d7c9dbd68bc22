"""What is looked at before anything goes up: kinds of folders, what is in them, names and paths. Nobody is asked."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlx_trainer.export.publishing.hub import push
from mlx_trainer.models import ModelError
from tests.export.folders import BASE, adapter, peft, run, weights
from tests.hub_files import OWNER
from tests.tiny import tiny_mistral

NAME = "owner/tiny-chat"


@pytest.mark.parametrize("kind", ["peft", "model", "quantized"])
def test_each_kind_has_its_library_and_files(kind: str, tmp_path: Path) -> None:
    """PEFT and merged models bring their tokenizer; what they are loaded with is in the card."""
    folder = peft(tmp_path) if kind == "peft" else tiny_mistral(tmp_path, bits=4 if kind == "quantized" else None)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    upload = push(folder, NAME, dry_run=True, base_model=BASE)
    data = ModelCard(upload.card).data
    relation = "adapter" if kind == "peft" else "finetune"
    library = {"peft": "peft", "model": "transformers", "quantized": "mlx"}[kind]
    assert (data.library_name, data["base_model_relation"], data.base_model) == (library, relation, BASE)
    assert {"chat_template.jinja", "README.md"} < set(upload.files)
    assert ("tokenizer.json" in upload.files) == (kind != "peft")
    assert ("PeftModel" in upload.card, "AutoModelForCausalLM" in upload.card) == (kind == "peft", kind != "quantized")


def test_no_path_of_this_machine_goes_up(tmp_path: Path) -> None:
    """Neither as base model nor elsewhere in the settings; a base that is a folder has its Hub name given, or none."""
    base = tiny_mistral(tmp_path / "private" / "base")
    folder = run(tmp_path / "run", str(base), dataset=str(tmp_path / "private" / "chats.jsonl"), data={"rows": 1})
    (folder / "adapter_config.json").write_text(
        json.dumps({"model": str(base), "data": f"{tmp_path}/private", "num_layers": 1})
    )
    upload = push(folder, NAME, dry_run=True)
    assert "private" not in upload.card.replace("type: private", "")
    assert ModelCard(upload.card).data.base_model is None
    assert upload.notes[0] == ("the card names no base model, for only a folder is known: give --base-model OWNER/NAME")
    assert upload.files["adapter_config.json"] == len(json.dumps({"num_layers": 1}, indent=2)) + 1
    named = push(folder, NAME, dry_run=True, base_model=BASE)
    assert ModelCard(named.card).data.base_model == BASE
    assert named.files["adapter_config.json"] == len(json.dumps({"model": BASE, "num_layers": 1}, indent=2)) + 1
    with pytest.raises(ModelError, match=r"The base model '.*base' is no name on the Hub; give OWNER/NAME"):
        push(folder, NAME, dry_run=True, base_model=str(base))


def test_a_base_by_a_relative_path_is_not_named_either(tmp_path: Path) -> None:
    """`./base` means nothing elsewhere; a name on the Hub stays as it is."""
    sizes = {
        base: push(adapter(tmp_path, base), NAME, dry_run=True).files["adapter_config.json"]
        for base in ("./base", BASE)
    }
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    without = {key: value for key, value in written.items() if key != "model"}
    assert sizes == {"./base": len(json.dumps(without, indent=2)) + 1, BASE: len(json.dumps(written))}


def test_a_card_in_the_folder_stays_and_is_checked(tmp_path: Path) -> None:
    """Its text is the user's; a path as its base is refused, or replaced by the name that was given."""
    folder = adapter(tmp_path)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: /home/me/base\n---\n\nMy words.\n")
    with pytest.raises(ModelError, match=r"README.md names '/home/me/base' as base_model, no name on the Hub"):
        push(adapter(tmp_path, "/home/me/base"), NAME, dry_run=True)
    card = ModelCard(push(folder, NAME, dry_run=True, base_model=BASE, language=["en"]).card)
    assert (card.data.base_model, card.data.license, card.data.language) == (BASE, "mit", ["en"])
    assert card.text.strip() == "My words."
    (folder / "README.md").write_text("---\n{: [\n---\n")
    with pytest.raises(ModelError, match=r"README.md has no metadata that can be read"):
        push(folder, NAME, dry_run=True)


def broken(folder: Path, how: str) -> None:
    """Break an adapter's folder in one way."""
    config, tensors = folder / "adapter_config.json", folder / "adapters.safetensors"
    if how == "no configuration":
        config.unlink()
    elif how == "no weights":
        tensors.unlink()
    elif how == "half a file":
        os.truncate(tensors, tensors.stat().st_size - 1)
    elif how == "not finite":
        weights(tensors, value=float("nan"))
    elif how == "two kinds":
        weights(folder / "adapter_model.safetensors")
    elif how == "weights elsewhere":
        tensors.rename(folder.parent / "elsewhere")
        tensors.symlink_to(folder.parent / "elsewhere")
    elif how == "a token":
        config.write_text(json.dumps({"model": OWNER}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no configuration", r"is no whole mlx-lm adapter: adapter_config.json is missing; it holds adapters"),
        ("no weights", r"has no weights of a kind that can be handed over: adapters.safetensors \(mlx-lm adapter\)"),
        ("half a file", r"adapters.safetensors is not a complete safetensors file"),
        ("not finite", r"adapters.safetensors holds NaN or infinity in model.layers.0"),
        ("two kinds", r"holds more than one kind \(mlx-lm adapter, PEFT adapter\); give each its own folder"),
        ("weights elsewhere", r"is no whole mlx-lm adapter: adapters.safetensors is missing"),
        ("a token", r"adapter_config.json holds an access token; take it out"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(how: str, message: str, tmp_path: Path) -> None:
    """By name, before anything is sent; a token is not repeated."""
    folder = adapter(tmp_path / "adapter")
    broken(folder, how)
    with pytest.raises(ModelError, match=message) as caught:
        push(folder, NAME, dry_run=True)
    assert OWNER not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny-chat", "a/b/c", "../x", "owner/..", "owner/a--b", "owner/x\n", "./x"])
def test_a_name_that_no_repository_has_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything is read or sent."""
    with pytest.raises(ModelError, match=r"is no name of a repository; give OWNER/NAME"):
        push(tmp_path, name, dry_run=True)
