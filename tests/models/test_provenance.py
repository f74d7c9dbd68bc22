"""Which base model a run had: recorded cheaply, verified whole on request, against a stand-in of the Hub."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.models.provenance import SAMPLE_BYTES, SAMPLES, base_facts, sampled_digest, verify
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


class Hub(ThreadingHTTPServer):
    """The few addresses of the Hub that a snapshot needs, for one repository with two commits."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits = {commit: tiny_mistral(folder / commit, seed=seed) for seed, commit in enumerate((OLD, NEW))}
        self.main = OLD
        self.damaged = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def tree(self, commit: str) -> list[dict[str, Any]]:
        """Return what the repository holds; files of more than 100 kB are large ones."""
        return [self.entry(path) for path in sorted(self.commits[commit].iterdir())]

    def entry(self, path: Path) -> dict[str, Any]:
        """Return a file as the Hub lists it."""
        content = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path.name, "size": len(content), "oid": git}
        if len(content) > 100_000:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def found(self) -> tuple[bytes, dict[str, str]] | None:
        """The body and headers for the path, None where there is nothing."""
        if self.path.startswith("/api/models/someone/tiny/revision/main"):
            return json.dumps({"id": "someone/tiny", "sha": self.server.main, "siblings": []}).encode(), {}
        if match := re.match("/api/models/someone/tiny/tree/([0-9a-f]{40})", self.path):
            return json.dumps(self.server.tree(match[1])).encode(), {}
        if match := re.match("/someone/tiny/resolve/([0-9a-f]{40})/(.+)", self.path):
            path = self.server.commits[match[1]] / match[2]
            entry = self.server.entry(path)
            digest = entry.get("lfs", entry)["oid"]
            content = path.read_bytes()
            if self.server.damaged and path.suffix == ".safetensors":
                content = content[:-1] + bytes([content[-1] ^ 1])
            return content, {"X-Repo-Commit": match[1], "ETag": f'"{digest}"', "X-Linked-Size": str(entry["size"])}
        return None

    def do_GET(self) -> None:
        """Send headers and body."""
        found = self.found()
        body, headers = found or (b"", {})
        self.send_response(200 if found else 404)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Return a Hub of this test's own."""
    hub = Hub(tmp_path / "hub")
    yield hub
    hub.shutdown()
    hub.server_close()


def loaded(hub: Hub, cache: Path, *, revision: str = "", check: bool = False, moving: str | None = None) -> Any:
    """Load the model in a fresh process and return its facts, or the error; `main` may move after the tokenizer."""
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(cache)}
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
            hub.main = moving
        out, err = process.communicate("go\n", timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


def test_a_revision_is_pinned_and_recorded(hub: Hub, tmp_path: Path) -> None:
    """A branch is what it points to now, a commit stays that commit, and the facts tell which weights it was."""
    first = loaded(hub, tmp_path / "a")
    hub.main = NEW
    second, pinned = loaded(hub, tmp_path / "a"), loaded(hub, tmp_path / "a", revision=OLD)
    assert (first["revision"], second["revision"], pinned) == (OLD, NEW, first)
    assert first["files"] != second["files"]
    assert list(first["files"]) == ["model.safetensors"]


def test_tokenizer_and_weights_are_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    """Where the branch moves after the tokenizer was loaded, the weights are still of the commit that it was from."""
    assert loaded(hub, tmp_path / "a", moving=NEW)["revision"] == OLD


def test_wrong_bytes_of_the_right_size_are_found(hub: Hub, tmp_path: Path) -> None:
    """A download with a wrong bit loads without a word, for the client compares sizes; `verify` names the file."""
    hub.damaged = True
    assert loaded(hub, tmp_path / "a")["revision"] == OLD
    error = loaded(hub, tmp_path / "a", check=True)
    assert re.match(r".*/model\.safetensors is not what the Hub published \(its digest is not [0-9a-f]{64}\)\.", error)
    hub.damaged = False
    assert loaded(hub, tmp_path / "b", check=True)["revision"] == OLD


def test_small_files_are_verified_too(hub: Hub, tmp_path: Path) -> None:
    """A template or a configuration that was changed in the cache is found by Git's digest."""
    assert loaded(hub, tmp_path, check=True)["revision"] == OLD
    snapshot = next(tmp_path.glob(f"**/snapshots/{OLD}"))
    verify(snapshot)
    path = snapshot / "tokenizer_config.json"
    path.resolve().write_text(path.read_text() + " ")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not what the Hub published"):
        verify(snapshot)


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
