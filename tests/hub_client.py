"""Both major versions of huggingface_hub, each in a process of its own that calls our functions for the tests."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from tests.hub_server import Hub

ROOT = Path(__file__).parents[1]
OLDEST = "1.30.0"
"""The oldest huggingface_hub that pyproject.toml allows; the newest is the installed one."""

CHUNK_BYTES = 1 << 14
"""What has come of a download is written in pieces of this size, 10 MB by default; of the last, nothing is kept."""

PROGRAM = f"""
import json, os, sys, time, traceback
from pathlib import Path
import attrs, huggingface_hub.constants
from mlx_trainer.export.publishing.hub import push
from mlx_trainer.models import ModelError, resolve
from mlx_trainer.models.provenance import verify

huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = {CHUNK_BYTES}
waits, sleep = [], time.sleep
def short(seconds):
    if seconds >= 0.5:  # a retry
        waits.append(seconds)
    sleep(min(seconds, 0.01))
time.sleep = short

def version():
    return huggingface_hub.__version__

def plain(value):
    return attrs.asdict(value) if attrs.has(type(value)) else None if value is None else str(value)

calls = dict(push=push, resolve=resolve, verify=lambda folder: verify(Path(folder)), version=version)
for line in sys.stdin:
    name, arguments, keywords, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    waits.clear()
    answer = dict(waits=waits)
    try:
        answer["result"] = plain(calls[name](*arguments, **keywords))
    except ModelError as error:
        answer["error"] = str(error)
    except Exception:
        answer["error"] = "not foreseen: " + traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


@define
class Client:
    """A process with one version of huggingface_hub; `waits` are the seconds between the last call's retries."""

    process: "subprocess.Popen[str]"
    errors: Path
    waits: list[float]

    def call(self, name: str, *arguments: Any, token: str | None = None, **keywords: Any) -> Any:
        """Return what one of the program's functions returns, as JSON has it; what it raises is an AssertionError."""
        answer = self.ask(name, *arguments, token=token, **keywords)
        assert "result" in answer, answer["error"]
        return answer["result"]

    def refusal(self, name: str, *arguments: Any, token: str | None = None, **keywords: Any) -> str:
        """Return the text of the error that one of the functions raises."""
        answer = self.ask(name, *arguments, token=token, **keywords)
        assert "error" in answer, answer
        return str(answer["error"])

    def ask(self, name: str, *arguments: Any, token: str | None, **keywords: Any) -> Any:
        """Return the whole answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, [*map(str, arguments)], keywords, token]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        answer = json.loads(line)
        self.waits = answer["waits"]
        return answer


@contextmanager
def client(hub: Hub, major: int, folder: Path, **environment: str) -> Iterator[Client]:
    """Run a client of `hub` with huggingface_hub of a major version; skips where that cannot be had."""
    paths = [*([str(oldest(folder / "packages"))] if major == 1 else []), str(ROOT)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **hub.environment(folder / "home"), **environment}
    errors = folder / "errors.txt"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        errors.open("w") as stderr,
        subprocess.Popen([sys.executable, "-c", PROGRAM], env=variables, cwd=folder, stderr=stderr, **pipes) as process,
    ):
        running = Client(process, errors, [])
        assert running.call("version").startswith(f"{major}.")
        yield running
        process.stdin.close()


def oldest(folder: Path) -> Path:
    """Put the oldest huggingface_hub, and what it needs beside what 2.x needs, into a folder; skips where none is."""
    wanted = [f"huggingface_hub=={OLDEST}", "httpx<1", "httpcore<2"]
    installer = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if shutil.which("uv"):
        installer = ["uv", "pip", "install", "--python", sys.executable]
    command = [*installer, "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"huggingface_hub {OLDEST} cannot be installed here: {done.stderr.strip()[-200:]}")
    return folder
