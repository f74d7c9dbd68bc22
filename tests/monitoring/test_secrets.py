"""Access tokens are nowhere in what a run writes down, and ordinary words stay as they are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_trainer.monitoring import mask_secrets, write_environment
from mlx_trainer.monitoring.secrets import mask_arguments
from tests.tiny import tiny_mistral

SECRETS = {
    "HF_TOKEN": "hf_" + "QmFuYW5h" * 4,
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "OPENAI_API_KEY": "sk-" + "Zm9vYmFy" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYcanary",
    "GITHUB_TOKEN": "ghp_" + "c2VjcmV0" * 5,
    "DATABASE_PASSWORD": "correct horse battery",
    "MY_SERVICE_SECRET": "s3cr3t-canary-value",
}
UNSET = {"row": "hf_" + "Um93cm93" * 4, "address": "user:p4ssw0rd"}
"""Tokens that no variable tells of."""

RUN = """
import logging, os, sys
from pathlib import Path
from mlx_trainer import build
from mlx_trainer.config import load_config
from mlx_trainer.models import CausalLMModule

everything = " ".join(value for name, value in os.environ.items() if name in sys.argv[1].split(",")) + " " + sys.argv[2]
log = logging.getLogger("mlx_trainer.models")

def leaking(self, batch):
    log.warning("warned of %s", everything, extra={"detail": everything})
    try:
        raise RuntimeError(f"inner {everything}")
    except RuntimeError:
        log.exception("logged")
    if self.model.training and Path("broken").exists():
        raise RuntimeError(f"outer {everything}")

CausalLMModule.check_batch = leaking
config = load_config("run.yaml")
try:
    build.train(config)
except RuntimeError:
    assert Path("broken").exists()
"""
CONFIG = """
model: {model_name: base, dtype: float32, max_seq_length: 64}
lora: {rank: 2}
training: {batch_size: 2, gradient_accumulation_steps: 1, max_steps: 4, warmup_steps: 0, save_steps: 2, eval_steps: 2}
data: {dataset_path: chats.jsonl, train_split: 0.75, cache_dir: cache}
evaluation: {sample_prompts: [dog], sample_tokens: 2}
run: {directory: run, tensorboard: true}
"""


def workplace(folder: Path) -> None:
    """Write a model, eight rows that hold tokens, and a configuration."""
    tiny_mistral(folder / "base", layers=1)
    answer = f"the sum is {UNSET['row']} https://{UNSET['address']}@example.org {SECRETS['HF_TOKEN']}"
    rows = [
        {"messages": [{"role": "user", "content": "dog " * n}, {"role": "assistant", "content": answer[: 60 + n]}]}
        for n in range(8)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(CONFIG)


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "broken"])
def test_no_file_of_a_run_holds_a_token(tmp_path: Path, broken: bool) -> None:
    """Tokens in the environment, the command line, the rows, log lines and tracebacks of a real run are in no file."""
    workplace(tmp_path)
    if broken:
        (tmp_path / "broken").touch()
    text = " ".join([UNSET["row"], f"https://{UNSET['address']}@example.org"])
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, **SECRETS, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUN, ",".join(SECRETS), text, "--hub-token", "shown-nowhere-canary"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = {path.name for path in written}
    assert {"config.yaml", "environment.json", "train.jsonl", "errors.jsonl", "report.html"} <= names
    if not broken:
        assert {"state.json", "manifest.json", "metrics.jsonl", "samples.jsonl", "adapter_config.json"} <= names
    assert b"[hidden]" in written[tmp_path / "run/logs/errors.jsonl"]
    assert b"[hidden]" in written[tmp_path / "run/environment.json"]
    secrets = [*SECRETS.values(), *UNSET.values(), "shown-nowhere-canary"]
    leaks = [(path, secret) for path, content in written.items() for secret in secrets if secret.encode() in content]
    assert leaks == []
    assert [secret for secret in secrets if secret in done.stdout + done.stderr] == []


@pytest.mark.parametrize("line", ["sample_prompts: [TOKEN]", "sample_prompts: ['https://user:p4ssw0rd@example.org/a']"])
def test_a_configuration_with_a_token_is_refused(tmp_path: Path, line: str) -> None:
    """It would be kept beside the run and in each checkpoint; the refusal shows no token either and writes nothing."""
    workplace(tmp_path)
    text = CONFIG.replace("sample_prompts: [dog]", line.replace("TOKEN", UNSET["row"]))
    (tmp_path / "run.yaml").write_text(text)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "mlx_trainer", "train", "run.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "the configuration holds an access token" in done.stderr
    assert [secret for secret in UNSET.values() if secret in done.stderr + done.stdout] == []
    assert not (tmp_path / "run").exists()


def test_ordinary_words_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that look a little like tokens, short values, paths and other variables are left alone."""
    for name, value in {"X_TOKEN": "short", "TOKENIZERS_PARALLELISM": "trueish1", "SSH_KEY": "/root/.ssh/id"}.items():
        monkeypatch.setenv(name, value)
    text = "hf_hub_download sk-learn short trueish1 /root/.ssh/id https://example.org:80/a@b user:name@host AKIA"
    assert mask_secrets(text) == text


def test_a_secret_within_another_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer one is masked first, whatever order the variables come in."""
    monkeypatch.setenv("A_TOKEN", "canary-canary")
    monkeypatch.setenv("B_TOKEN", "canary-canary-longer")
    assert mask_secrets("(canary-canary-longer) (canary-canary)") == "([hidden]) ([hidden])"


def test_whatever_is_told_of_a_run_is_masked(tmp_path: Path) -> None:
    """environment.json takes any further facts; a token in them, however deep, is hidden."""
    path = write_environment(tmp_path, more={"model": [f"https://{UNSET['address']}@example.org", UNSET["row"]]})
    assert json.loads(path.read_text())["more"] == {"model": ["https://[hidden]@example.org", "[hidden]"]}


def test_arguments_after_a_secret_option() -> None:
    """Whatever follows is hidden, also behind an equals sign, and what comes after is shown."""
    arguments = ["train", "--hub-token", "abc", "--api-key=abc", "--db.password", "abc", "--lora.rank", "8"]
    hidden = ["train", "--hub-token", "[hidden]", "--api-key=[hidden]", "--db.password", "[hidden]", "--lora.rank", "8"]
    assert mask_arguments(arguments) == hidden
