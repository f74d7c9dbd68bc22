"""`generate` on the command line: where prompts come from, what is printed, and that each option arrives."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer import cli, trained
from mlx_trainer.config import LoRAConfig, ModelConfig
from mlx_trainer.models import CausalLMModule
from tests.tiny import tiny_mistral

QUESTIONS = ["Where is it?", "And the quick brown fox?", "Who?"]
CHAT = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and an adapter of it, untrained but for what it answers."""
    folder = tmp_path_factory.mktemp("models")
    module = CausalLMModule(tiny_mistral(folder / "base"), lora=LoRAConfig(rank=2), dtype="float32")
    module.save(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def module(folder: Path) -> CausalLMModule:
    """What the commands below answer with."""
    return trained.answering(ModelConfig(model_name=str(folder / "base"), dtype="float32", max_seq_length=256))


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """What `generate` prints."""
    model = ("--model", str(folder / "base"), "--model.dtype", "float32", "--model.max_seq_length", "256")
    assert cli.main(["generate", *model, *arguments]) == 0
    return capsys.readouterr().out


def test_prompts_come_from_the_command_line_and_from_files(
    capsys: pytest.CaptureFixture[str], folder: Path, module: CausalLMModule, tmp_path: Path
) -> None:
    """Texts, lines of a file, and rows of any form, whose own answer is the reference; a JSON object for each."""
    (tmp_path / "lines.txt").write_text(f"{QUESTIONS[1]}\n\n")
    rows: list[dict[str, Any]] = [
        {"prompt": QUESTIONS[2], "completion": "Me."},
        {"messages": [*CHAT, {"role": "assistant", "content": "You."}]},
        {"prompt": CHAT},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ("--prompts", str(tmp_path / "lines.txt"), "--prompts", str(tmp_path / "rows.jsonl"))
    out = run(capsys, folder, "--prompt", QUESTIONS[0], *files, "--json", "--max-tokens", "5", "--batch-size", "2")
    told = [json.loads(line) for line in out.splitlines()]
    answers = module.generate([*QUESTIONS, CHAT, CHAT], max_tokens=5)
    assert [each["generated_text"] for each in told] == answers
    assert [each["reference"] for each in told] == [None, None, "Me.", "You.", None]
    assert [each["prompt"] for each in told[:3]] == QUESTIONS
    assert told[3]["prompt"]["messages"] == told[4]["prompt"]["messages"] == CHAT


def test_every_option_arrives(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option of the command is one of the module's, under its name there."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(CausalLMModule, "answers", lambda self, prompts, **options: seen.append(options) or iter(["x"]))
    arguments = (
        "--prompt a --system b --max-tokens 3 --temperature 0.5 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.2"
    )
    run(capsys, folder, *arguments.split(), *"--timeout 4 --stop c --stop d --seed 7 --batch-size 2".split())  # noqa: SIM905
    sampling = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 7}
    assert seen == [{"system": "b", "max_tokens": 3, "timeout_s": 4.0, "stop": ["c", "d"], "batch_size": 2, **sampling}]


def test_an_adapter_brings_its_base(capsys: pytest.CaptureFixture[str], folder: Path, module: CausalLMModule) -> None:
    """Without --model the adapter's own base is loaded; an untrained adapter answers as its base does."""
    arguments = ["--adapter", str(folder / "adapter"), "--model.dtype", "float32", "--prompt", "Who?"]
    assert cli.main(["generate", *arguments, "--max-tokens", "6"]) == 0
    assert capsys.readouterr().out == module.generate(["Who?"], max_tokens=6)[0] + "\n"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("\udce4", "rows.jsonl: byte 0 is no UTF-8; save the file as UTF-8"),
        ('{"text": "x"}', "rows.jsonl:1: this is no object with `prompt` or `messages`"),
        ('{"prompt": "x"}\n{"prompt', "rows.jsonl:2: Unterminated string"),
        ("", "there is nothing to answer; give --prompt TEXT or --prompts FILE"),
    ],
)
def test_prompts_that_are_none_are_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, lines: str, reason: str
) -> None:
    """With file and line, before any model is loaded."""
    (tmp_path / "rows.jsonl").write_bytes(lines.encode(errors="surrogateescape"))
    assert cli.main(["generate", "--model", "./nowhere", "--prompts", str(tmp_path / "rows.jsonl")]) == 2
    assert reason in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(folder: Path) -> None:
    """A reader that leaves after the first line, as `head -1` does, hears nothing more, and no error is told."""
    command = [sys.executable, "-m", "mlx_trainer", "generate", "--model", str(folder / "base"), "--model.dtype"]
    command += ["float32", "--json", "--batch-size", "1", "--max-tokens", "3", *(["--prompt", "Who?"] * 50)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["prompt"] == "Who?"
    process.stdout.close()
    assert "rror" not in process.stderr.read().decode()
    assert process.wait(60) == 0
    process.stderr.close()
