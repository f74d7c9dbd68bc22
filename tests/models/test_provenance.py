"""Which base model a run had: recorded cheaply, verified whole on request, against a stand-in of the Hub."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer.config import load_config
from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.models.provenance import SAMPLE_BYTES, SAMPLES, base_facts, sampled_digest
from tests.hub_server import Hub
from tests.tiny import tiny_mistral

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
PROGRAM = """
import json, sys
from mlx_trainer.models import CausalLMModule, ModelError
cache, revision, check = sys.argv[1:]
module = CausalLMModule("someone/tiny", cache_dir=cache, revision=revision or None, dtype="float32", verify=bool(check))
try:
    module.tokenizer
    if sys.stdin.readline():  # the branch may have moved meanwhile
        module.setup("predict")
    print(json.dumps(module.base_facts()))
except ModelError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Return a Hub of this test's own, with a model of two commits."""
    with Hub() as hub:
        hub.add("someone/tiny", *(tiny_mistral(tmp_path / f"hub{seed}", seed=seed) for seed in range(2)))
        yield hub
        hub.shutdown()


def move(hub: Hub, commit: str) -> None:
    """Have `main` point to another commit."""
    hub.repositories["someone/tiny"].branches["main"] = commit


def loaded(hub: Hub, cache: Path, *, revision: str = "", check: bool = False, moving: str | None = None) -> Any:
    """Load the model in a fresh process and return its facts, or the error; `main` may move after the tokenizer."""
    environment = {**os.environ, **hub.environment(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(cache), revision, "1" if check else ""]
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen(command, env=environment, **pipes) as process:
        if moving is not None:
            while process.poll() is None and not list(cache.glob("**/tokenizer.json")):
                time.sleep(0.01)
            move(hub, moving)
        out, err = process.communicate("go\n", timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_revision_is_pinned_and_recorded(hub: Hub, tmp_path: Path) -> None:
    """A branch is what it points to now, a commit stays that commit, and the facts tell which weights it was."""
    first = loaded(hub, tmp_path / "a")
    move(hub, NEW)
    second, pinned = loaded(hub, tmp_path / "a"), loaded(hub, tmp_path / "a", revision=OLD)
    assert (first["revision"], second["revision"], pinned) == (OLD, NEW, first)
    assert first["files"] != second["files"]
    assert list(first["files"]) == ["model.safetensors"]


def test_tokenizer_and_weights_are_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    """Where the branch moves after the tokenizer was loaded, the weights are still of the commit that it was from."""
    assert loaded(hub, tmp_path / "a", moving=NEW)["revision"] == OLD


def trained(hub: Hub, folder: Path, *arguments: str) -> str:
    """Train in a fresh process in `folder`, and return the commit that the run's configuration names."""
    environment = {**os.environ, **hub.environment(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    small = {"model.dtype": "float32", "model.max_seq_length": "64", "lora.rank": "2", "data.train_split": "1"}
    options = [f"--{key}={value}" for key, value in small.items()]
    command = [sys.executable, "-m", "mlx_trainer", "train", *arguments, *options, "--output", "run"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    revision = load_config(folder / "run" / "config.yaml").model.revision
    assert json.loads((folder / "run" / "environment.json").read_text())["model"]["revision"] == revision
    return str(revision)


def test_a_run_keeps_the_commit_that_it_began_with(hub: Hub, tmp_path: Path) -> None:
    """Resumed after the branch has moved, by its own configuration or by the recipe, which names no revision; another
    run begins with what the branch is now.
    """
    (tmp_path / "chats.jsonl").write_text('{"prompt": "dog", "completion": "sleep"}\n' * 20)
    recipe = ("chats.jsonl", "--model", "someone/tiny", "--training.num_epochs")
    assert trained(hub, tmp_path, *recipe, "1") == OLD
    move(hub, NEW)
    assert trained(hub, tmp_path, "run/config.yaml", "--resume", "auto", "--training.num_epochs", "2") == OLD
    assert trained(hub, tmp_path, *recipe, "3", "--resume", "auto") == OLD
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*")).name
    assert trained(hub, tmp_path, *recipe, "4", "--resume", f"run/checkpoints/{checkpoint}") == OLD
    (tmp_path / "run").rename(tmp_path / "before")
    assert trained(hub, tmp_path, *recipe, "1") == NEW


def test_the_option_verifies_what_came(hub: Hub, tmp_path: Path) -> None:
    """A download with a wrong bit loads without a word, for the client compares sizes; `verify` names the file."""
    hub.damaged.add("model.safetensors")
    assert loaded(hub, tmp_path)["revision"] == OLD
    error = loaded(hub, tmp_path, check=True)
    assert re.match(r".*/model\.safetensors is not what the Hub published \(its digest is not [0-9a-f]{64}\)\.", error)


def test_a_local_folder_has_nothing_to_be_verified_against(tmp_path: Path) -> None:
    """Asked for, it is refused rather than passed over."""
    module = CausalLMModule(tiny_mistral(tmp_path), verify=True, max_seq_length=64)
    with pytest.raises(ModelError, match="is no snapshot of the Hub, so there is nothing to verify it against"):
        module.setup("fit")


def test_sampled_digests_tell_trainings_apart(tmp_path: Path) -> None:
    """Other weights of the same shapes, and a change in any sampled part, have another digest; names play no part."""
    facts = [base_facts(tiny_mistral(tmp_path / str(seed), seed=seed // 2))["files"] for seed in range(4)]
    assert facts[0] == facts[1] != facts[2] == facts[3]
    path = tmp_path / "large"
    size = 3 * SAMPLES * SAMPLE_BYTES
    content = bytearray(os.urandom(size))
    digests = set()
    for place in (0, SAMPLE_BYTES - 1, size - 1, size - SAMPLE_BYTES):
        content[place] ^= 1
        path.write_bytes(content)
        digests.add(sampled_digest(path))
    path.write_bytes(content[:-1])
    assert len(digests | {sampled_digest(path)}) == 5
