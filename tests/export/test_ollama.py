"""The Modelfile: what it names, what it quotes, what it refuses. Ollama itself was not run."""

import json
from pathlib import Path

import pytest

from mlx_trainer.export.programs.ollama import MISTRAL, modelfile, ollama
from mlx_trainer.models import ModelError
from tests.export.converter import gguf
from tests.export.folders import adapter, peft
from tests.tiny import tiny_mistral


def test_a_mistral_folder_has_its_template_and_the_end_of_an_answer(tmp_path: Path) -> None:
    """The path is relative where folder and Modelfile can be moved together; other architectures keep Ollama's own."""
    folder = tiny_mistral(tmp_path / "merged")
    text = ollama(folder, tmp_path).read_text()
    assert text == f'FROM ./merged\nTEMPLATE """{MISTRAL}"""\nPARAMETER stop "</s>"\n'
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert ollama(folder, tmp_path / "other").read_text() == f'FROM {folder}\nPARAMETER stop "</s>"\n'


def test_a_gguf_file_brings_all_that_is_needed(tmp_path: Path) -> None:
    """Only its place is named; an adapter in GGUF is refused, for Ollama makes its own."""
    (tmp_path / "m.gguf").write_bytes(gguf({"general.type": "model"}))
    assert ollama(tmp_path / "m.gguf", tmp_path).read_text() == "FROM ./m.gguf\n"
    (tmp_path / "a.gguf").write_bytes(gguf({"general.type": "adapter"}))
    with pytest.raises(ModelError, match=r"a.gguf is an adapter in GGUF; give its PEFT export and a base"):
        ollama(tmp_path / "a.gguf", tmp_path / "b")
    with pytest.raises(ModelError, match=r"Modelfile is there already; name another folder"):
        ollama(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize("make", [adapter, peft])
def test_an_adapter_needs_a_base_that_ollama_has(make: object, tmp_path: Path) -> None:
    """Both layouts, mlx-lm's with the `alpha` that Ollama reads; without it the adapter would do nothing."""
    folder = make(tmp_path / "lora")  # type: ignore[operator]
    assert ollama(folder, tmp_path, base="mistral:7b").read_text() == "FROM mistral:7b\nADAPTER ./lora\n"
    with pytest.raises(
        ModelError, match=r"lora is an adapter; give its base model as Ollama calls it, such as mistral"
    ):
        ollama(folder, tmp_path / "b")
    if make is adapter:
        adapter(folder, lora_parameters={"rank": 4, "scale": 2.0})
        with pytest.raises(ModelError, match=r"adapter_config.json has no alpha, and Ollama would take 0"):
            ollama(folder, tmp_path / "b", base="mistral")


def test_what_ollama_does_not_read_is_refused(tmp_path: Path) -> None:
    """MLX's quantized weights, and a base beside a whole model."""
    with pytest.raises(ModelError, match=r"is quantized by MLX, which Ollama does not read"):
        ollama(tiny_mistral(tmp_path / "q", bits=4), tmp_path / "out")
    with pytest.raises(ModelError, match=r"is a merged model; a base is for adapters"):
        ollama(tiny_mistral(tmp_path / "m"), tmp_path / "out", base="mistral")
    assert not (tmp_path / "out").exists()


def test_quoting_lets_nothing_out() -> None:
    """A text with a quote or a line end stands between three quotes; one that could end those is refused."""
    assert modelfile("a b", stop=['say "x" now', "\n\n"]) == (
        'FROM "a b"\nPARAMETER stop """say "x" now"""\nPARAMETER stop """\n\n"""\n'
    )
    for text in ('"', 'x"', 'a"""\nFROM evil'):
        with pytest.raises(ModelError, match="cannot be written into a Modelfile"):
            modelfile("m", stop=[text])
