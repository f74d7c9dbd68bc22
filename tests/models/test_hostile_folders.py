"""Model and adapter folders made to harm: no code of theirs runs, no pickle is opened, nothing waits on a pipe."""

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.config import ConfigError, load_config
from mlx_trainer.data import DataError, DataPipeline
from mlx_trainer.models import CausalLMModule, ModelError
from tests.tiny import tiny_mistral


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Return a tiny model."""
    return tiny_mistral(tmp_path / "base", layers=1)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Return the path of a file that hostile code would make."""
    return tmp_path / "canary"


@pytest.fixture(autouse=True)
def _never_blocked() -> Iterator[None]:
    """Whatever waits is ended after 30 seconds with an error."""

    def give_up(number: int, frame: object) -> None:
        raise TimeoutError("blocked for 30 seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Bomb:
    """Makes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def edit(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(base: Path) -> CausalLMModule:
    """Load model and tokenizer."""
    module = CausalLMModule(base, dtype="float32", max_seq_length=64)
    module.setup("fit")
    assert module.tokenizer
    return module


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.npz", "model.gguf"])
def test_weights_of_another_kind_are_not_opened(base: Path, canary: Path, name: str) -> None:
    """Alone, they are no weights; beside good ones they lie there unread."""
    bomb = pickle.dumps(Bomb(canary))
    (base / name).write_bytes(bomb)
    (base / "vocab.pkl").write_bytes(bomb)
    load(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(model\*\.safetensors\)"):
        load(base)
    (base / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a complete safetensors file but a pickle"):
        load(base)
    assert not canary.exists()
    pickle.loads(bomb)  # noqa: S301 - it would have been seen
    assert canary.exists()


@pytest.mark.parametrize("name", ["adapters.npz", "adapter_model.bin", "adapters.pt", "adapters.gguf"])
def test_adapters_of_another_kind_are_not_opened(base: Path, canary: Path, tmp_path: Path, name: str) -> None:
    """An adapter is adapters.safetensors, whatever else lies beside it."""
    module, adapter = load(base), tmp_path / "adapter"
    module.save(adapter)
    (adapter / name).write_bytes(pickle.dumps(Bomb(canary)))
    module.load(adapter)
    np.savez(adapter / "objects.npz", np.array([Bomb(canary)], dtype=object))
    (adapter / "objects.npz").rename(adapter / "adapters.safetensors")
    with pytest.raises(ModelError, match=r"adapters\.safetensors is not a complete safetensors file but a zip archive"):
        module.load(adapter)
    (adapter / "adapters.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter: adapters\.safetensors is missing"):
        module.load(adapter)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_file": "evil.py"}),
        ("config.json", {"model_file": "../evil.py"}),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        ("config.json", {"custom_pipeline": "evil"}),
        ("config.json", {"model_file": "evil.py", "model_type": "evil"}),
    ],
    ids=["model_file", "model_file outside", "auto_map", "auto_map tokenizer", "pipeline", "unknown type"],
)
def test_code_of_a_model_does_not_run(base: Path, canary: Path, file: str, changes: dict[str, object]) -> None:
    """mlx-lm's CVE-2026-5843 and its relatives: the folder is refused, and the canary is never made."""
    for folder in (base, base.parent):
        (folder / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    edit(base / file, **changes)
    with pytest.raises(ModelError, match=r"runs its own code|cannot be read"):
        load(base)
    assert not canary.exists()


def test_code_of_a_tokenizer_does_not_run(base: Path, canary: Path) -> None:
    """transformers takes its own class for tokenizer.json, and without that file refuses."""
    (base / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    code = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "EvilT"}
    edit(base / "tokenizer_config.json", **code)
    load(base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load(base)
    assert not canary.exists()


def test_code_that_is_trusted_runs(base: Path, canary: Path) -> None:
    """The canary of the test above does sing."""
    (base / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\nfrom mlx_lm.models.llama import *\n")
    edit(base / "config.json", model_file="evil.py")
    CausalLMModule(base, dtype="float32", max_seq_length=64, trust_remote_code=True).setup("fit")
    assert canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        '{"model_type": "mistral"',
        "\0",
        '"' + "x" * 70_000_000 + '"',
        "[]",
    ],
    ids=["deep list", "deep object", "long number", "cut short", "NUL", "70 MB", "a list"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_hostile_json(base: Path, tmp_path: Path, name: str, text: str) -> None:
    """A sentence that names the file; never a traceback of Python's, and no more memory than the file is long."""
    module, adapter = load(base), tmp_path / "adapter"
    module.save(adapter)
    folder = adapter if name.startswith("adapter") else base
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=name):
        module.load(adapter) if folder == adapter else load(base)


def as_fifo(path: Path) -> None:
    """A pipe that nobody writes to."""
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    """A folder."""
    path.mkdir()


def as_endless_device(path: Path) -> None:
    """A link to zeros without end."""
    path.symlink_to("/dev/zero")


def as_nothing(path: Path) -> None:
    """A link that leads nowhere."""
    path.symlink_to(path.parent / "nowhere")


def data_of(base: Path, tmp_path: Path) -> None:
    """Read the rows."""
    DataPipeline(tmp_path / "rows.jsonl", CausalLMModule(base).tokenizer, cache_dir=tmp_path / "cache")


READERS: dict[str, tuple[Callable[[Path, Path], Any], type[Exception]]] = {
    "rows.jsonl": (data_of, DataError),
    "run.yaml": (lambda base, folder: load_config(folder / "run.yaml"), ConfigError),
    "run.json": (lambda base, folder: load_config(folder / "run.json"), ConfigError),
    "base/config.json": (lambda base, folder: load(base), ModelError),
    "base/generation_config.json": (lambda base, folder: load(base), ModelError),
    "base/model.safetensors": (lambda base, folder: load(base), ModelError),
    "base/model-extra.safetensors": (lambda base, folder: load(base), ModelError),
    "base/tokenizer.json": (lambda base, folder: load(base), ModelError),
    "base/tokenizer_config.json": (lambda base, folder: load(base), ModelError),
    "base/chat_template.jinja": (lambda base, folder: load(base), ModelError),
    "adapter/adapters.safetensors": (lambda base, folder: load(base).load(folder / "adapter"), ModelError),
    "adapter/adapter_config.json": (lambda base, folder: load(base).load(folder / "adapter"), ModelError),
}


@pytest.mark.parametrize("make", [as_fifo, as_directory, as_endless_device, as_nothing])
@pytest.mark.parametrize("place", READERS)
def test_what_is_no_file_is_refused_at_once(
    base: Path, tmp_path: Path, place: str, make: Callable[[Path], None]
) -> None:
    """A pipe, a folder, a device and a link to nowhere, for every file that is read: an error of ours that names it."""
    load(base).save(tmp_path / "adapter")
    path = tmp_path / place
    path.unlink(missing_ok=True)
    make(path)
    read, error = READERS[place]
    with pytest.raises(error, match=path.stem):
        read(base, tmp_path)


def test_links_to_files_are_followed(base: Path, tmp_path: Path) -> None:
    """A Hub snapshot is all links, and a hard link is a file like any other: both are only read."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        os.link(path, linked / path.name) if number % 2 else (linked / path.name).symlink_to(path)
    assert load(linked).parameter_stats == load(base).parameter_stats


@pytest.mark.parametrize("kind", [mx.int32, mx.uint8, mx.bool_])
def test_weights_that_are_no_floats_are_refused(base: Path, kind: mx.Dtype) -> None:
    """mlx-lm takes integers for a plain layer's weights without a word."""
    path = base / "model.safetensors"
    weights = mx.load(str(path))
    assert isinstance(weights, dict)
    mx.eval(weights)
    weights["model.norm.weight"] = weights["model.norm.weight"].astype(kind)
    mx.save_safetensors(str(path), weights)
    with pytest.raises(ModelError, match=rf"have model\.norm\.weight as {kind}, which is no float"):
        load(base)


TEMPLATES = {
    "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "function": "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr filter": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "changes": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "endless": "{% for i in range(10**9) %}x{% endfor %}",
    "division": "{{ 1 // 0 }}",
    "syntax": "{% if %}",
}


@pytest.mark.parametrize("attack", TEMPLATES)
def test_a_template_stays_in_its_sandbox(base: Path, tmp_path: Path, canary: Path, attack: str) -> None:
    """Every attempt to get out, and every other failure, makes bad rows and a ModelError for a prompt; nothing runs."""
    row = {"messages": [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "the sum"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (base / "chat_template.jinja").write_text(TEMPLATES[attack].replace("CANARY", str(canary)))
    module = load(base)
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used.*\n.*rows\.jsonl:1: messages.*template"):
        DataPipeline(tmp_path / "rows.jsonl", module.tokenizer, cache_dir=tmp_path / "cache")
    with pytest.raises(ModelError, match="A prompt cannot be written: messages: the chat template refuses them: "):
        module.generate(["dog"])
    assert not canary.exists()
