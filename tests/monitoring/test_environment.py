"""What a run ran on, without secrets."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_trainer import runtime
from mlx_trainer.monitoring import environment_facts, write_environment

TOKEN = "hf_" + "Zz09" * 9


def git(folder: Path, *arguments: str) -> str:
    """Run git there, as somebody, and return what it printed."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_facts_name_versions_device_and_blas() -> None:
    """The packages that decide about numbers have a version, the device a name, and the BLAS its line."""
    facts = environment_facts()
    assert {name for name, version in facts["packages"].items() if version} >= {"mlx", "mlx-lm", "tokenizers"}
    assert facts["device"] == runtime.device_name()
    assert facts["blas"] == runtime.blas_report()
    assert facts["memory_gb"] > 0


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_and_changes_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a repository there is no commit; inside it is named, and dirty as soon as a file differs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment_facts()["git"] is None
    git(tmp_path, "init", "-q")
    (tmp_path / "chats.jsonl").write_text("{}\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "data")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert environment_facts()["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "chats.jsonl").write_text("{} \n")
    assert environment_facts()["git"] == {"commit": commit, "dirty": True}


def test_the_file_has_no_tokens_and_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the command line only secrets are hidden, of the environment nothing is written."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MY_PRIVATE_VARIABLE", "not to be told")
    arguments = ["train", "chats.jsonl", "--hub-token", "abc", "--rank", "8", "--api_key=def", f"--note={TOKEN}"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mlx-trainer", *arguments])
    text = write_environment(tmp_path, seed=42).read_text()
    facts = json.loads(text)
    hidden = ["train", "chats.jsonl", "--hub-token", "[hidden]", "--rank", "8", "--api_key=[hidden]", "--note=[hidden]"]
    assert facts["command"] == ["mlx-trainer", *hidden]
    assert facts["seed"] == 42
    assert TOKEN not in text
    assert "not to be told" not in text
