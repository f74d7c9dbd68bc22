"""GGUF through llama.cpp's converters: a stand-in with their command line, and the real ones where LLAMA_CPP is set."""

import io
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer.export.programs.gguf import gguf
from mlx_trainer.export.programs.gguf_header import read_header
from mlx_trainer.models import ModelError
from tests.export import converter
from tests.export.folders import adapter, peft
from tests.tiny import CORPUS, tiny_mistral

SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
REAL = os.environ.get("LLAMA_CPP")


@pytest.fixture(autouse=True)
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide what this machine may have."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """Return a folder with both converters."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in SCRIPTS:
        shutil.copy(converter.__file__, folder / name)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a merged model."""
    return tiny_mistral(tmp_path / "merged")


def test_a_merged_model_is_converted_as_asked(llama_cpp: Path, model: Path, tmp_path: Path) -> None:
    """The converter gets the folder, the type and a file beside the output, which is all that is left."""
    (tmp_path / "out").mkdir()
    header = gguf(model, tmp_path / "out" / "model.gguf", outtype="q8_0", llama_cpp=llama_cpp)
    assert header.metadata["general.name"] == "--outfile FILE --outtype q8_0"
    assert header == read_header(tmp_path / "out" / "model.gguf")
    assert (header.tensors, header.metadata["tokenizer.ggml.tokens"]) == (1, 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("base", [None, "someone/base", "folder"])
def test_an_adapter_is_converted_on_its_base(llama_cpp: Path, tmp_path: Path, base: str | None) -> None:
    """A folder and a name on the Hub have options of their own; without either the converter takes PEFT's word."""
    folder = tmp_path / "folder"
    folder.mkdir()
    given = str(folder) if base == "folder" else base
    header = gguf(peft(tmp_path / "peft"), tmp_path / "a.gguf", base=given, llama_cpp=llama_cpp)
    told = {None: "", "someone/base": " --base-model-id someone/base", "folder": f" --base {folder}"}[base]
    assert header.metadata["general.name"] == f"--outfile FILE --outtype f16{told}"
    assert header.metadata["adapter.lora.alpha"] == 8.0


def test_the_converter_is_found_by_variable_and_path(
    llama_cpp: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLAMA_CPP names its folder; else it is a program on PATH; else one message says what to fetch."""
    with pytest.raises(
        ModelError, match=r"convert_hf_to_gguf.py of llama.cpp is not here. Get it \(git clone --depth 1 "
    ):
        gguf(model, tmp_path / "0.gguf")
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp))
    gguf(model, tmp_path / "1.gguf")
    monkeypatch.delenv("LLAMA_CPP")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / SCRIPTS[0]
    program.write_text(f"#!{shutil.which('python3', path=os.defpath) or '/usr/bin/env python3'}\n")
    program.write_text(program.read_text() + (llama_cpp / SCRIPTS[0]).read_text())
    program.chmod(0o755)
    gguf(model, tmp_path / "2.gguf")
    with pytest.raises(ModelError, match=r"elsewhere has no convert_hf_to_gguf.py; give the folder of llama.cpp"):
        gguf(model, tmp_path / "3.gguf", llama_cpp=tmp_path / "elsewhere")
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["1.gguf", "2.gguf"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", r"merged could not be converted \(code 1\): Loading \| Model FooForCausalLM is not supported\.$"),
        ("module", r"No module named 'torch'. Install what it needs: python -m pip install torch gguf sentencepiece"),
        ("no file", r"model.gguf is cut off or broken in its head: .*No such file"),
        ("garbage", r"is no GGUF file: it does not begin with GGUF"),
        ("half", r"is cut off or broken in its head: a text ends too early"),
    ],
)
def test_what_goes_wrong_leaves_nothing(fault: str, message: str, llama_cpp: Path, model: Path, tmp_path: Path) -> None:
    """The converter's last words are told, and no half file stays."""
    (model / "fault.txt").write_text(fault)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=message):
        gguf(model, tmp_path / "out" / "m.gguf", llama_cpp=llama_cpp)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_that_is_something_else_is_not_kept(llama_cpp: Path, model: Path, tmp_path: Path) -> None:
    """Such as an adapter where a whole model was to be made."""
    text = (llama_cpp / SCRIPTS[0]).read_text()
    (llama_cpp / SCRIPTS[0]).write_text(text.replace('"tokenizer.ggml.tokens"', '"tokenizer.ggml.other"'))
    with pytest.raises(ModelError, match=r"made of .*merged has no right tokenizer.ggml.tokens; it was not kept"):
        gguf(model, tmp_path / "m.gguf", llama_cpp=llama_cpp)
    assert not (tmp_path / "m.gguf").exists()


def test_what_llama_cpp_cannot_read_is_refused(llama_cpp: Path, model: Path, tmp_path: Path) -> None:
    """By name and before the converter runs; nothing is overwritten."""
    quantized, lora = tiny_mistral(tmp_path / "quantized", bits=4), peft(tmp_path / "peft")
    with pytest.raises(ModelError, match=r"quantized is quantized by MLX, which llama.cpp does not read"):
        gguf(quantized, tmp_path / "m.gguf", llama_cpp=llama_cpp)
    with pytest.raises(ModelError, match=r"is an mlx-lm adapter, which llama.cpp does not read"):
        gguf(adapter(tmp_path / "adapter"), tmp_path / "m.gguf", llama_cpp=llama_cpp)
    settings = json.loads((lora / "adapter_config.json").read_text())
    for key in ("use_rslora", "use_dora"):
        (lora / "adapter_config.json").write_text(json.dumps({**settings, key: True}))
        with pytest.raises(ModelError, match=rf"peft has {key}, which a GGUF adapter cannot say: merge it instead"):
            gguf(lora, tmp_path / "m.gguf", llama_cpp=llama_cpp)
    with pytest.raises(ModelError, match=r"outtype is 'q4_k'; it must be one of f32, f16, bf16, q8_0"):
        gguf(model, tmp_path / "m.gguf", outtype="q4_k", llama_cpp=llama_cpp)
    with pytest.raises(ModelError, match=r"merged is a merged model; a base is for adapters"):
        gguf(model, tmp_path / "m.gguf", base="someone/base", llama_cpp=llama_cpp)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(ModelError, match=r"m.gguf is there already; name another file, or remove it"):
        gguf(model, tmp_path / "m.gguf", llama_cpp=llama_cpp)
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.mark.skipif(REAL is None, reason="the real converters: LLAMA_CPP names no folder of llama.cpp")
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_real_converter_takes_our_command_line(outtype: str, model: Path, tmp_path: Path) -> None:
    """A model with a SentencePiece vocabulary, as Mistral's; its weights are in the file, MLX reads them back."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the converter needs sentencepiece")
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=vocabulary, vocab_size=340, model_type="bpe", byte_fallback=True,
        pad_id=-1,
    )  # fmt: skip
    (model / "tokenizer.model").write_bytes(vocabulary.getvalue())
    header = gguf(model, tmp_path / "m.gguf", outtype=outtype, llama_cpp=REAL)
    assert (header.metadata["general.architecture"], header.tensors) == ("llama", 21)
    assert "[INST]" in header.metadata["tokenizer.chat_template"]
    if outtype == "f32":
        found = mx.load(str(tmp_path / "m.gguf"))["blk.0.ffn_down.weight"]
        expected = mx.load(str(model / "model.safetensors"))["model.layers.0.mlp.down_proj.weight"]
        assert mx.array_equal(found, expected).item()
