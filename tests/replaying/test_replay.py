"""A step of a finished run, taken again: the same numbers, and what in the step they come from."""

import json
import math
from pathlib import Path

import attrs
import pytest

from mlx_trainer import build, cli, replaying
from mlx_trainer.checkpoint import CheckpointError
from mlx_trainer.config import ConfigError, load_config
from mlx_trainer.data import Example
from mlx_trainer.monitoring import MetricsTracker, read_json_lines
from mlx_trainer.replaying.text import as_text
from tests.tiny import tiny_mistral

EVERY, LAST = 4, 12
SETTINGS = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 64,
    "lora.rank": 2,
    "lora.dropout": 0.2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.num_epochs": 3,
    "training.warmup_steps": 2,
    "training.max_grad_norm": 0.5,
    "training.learning_rate": 1e-2,
    "training.save_steps": EVERY,
    "training.keep_last": 9,
    "training.keep_best": False,
    "training.logging_steps": 1,
    "training.eval_steps": 5,
    "data.dataset_path": "chats.jsonl",
    "data.train_split": 0.8,
    "run.directory": "run",
    "run.ledger": True,
    "run.tensorboard": False,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a run of twelve steps was made, three epochs of four: windows of 2, 2, 2 and 1 batches."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_mistral(folder / "base")
        rows = [
            {"messages": [{"role": "user", "content": "dog " * (n % 7)}, {"role": "assistant", "content": f"sum {n}"}]}
            for n in range(1, 18)
        ]
        Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert build.train(load_config(overrides=SETTINGS)).steps == LAST
    return folder


@pytest.fixture(autouse=True)
def at_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in that folder."""
    monkeypatch.chdir(workplace)


@pytest.mark.parametrize(("step", "begun_at"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (12, 8)])
def test_a_step_is_the_run_s_own_bit_for_bit(step: int, begun_at: int) -> None:
    """Losses on the way are those of the log, parameters those of the checkpoint, rows those of the ledger."""
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    found = replaying.replay("run", step)
    assert (found.step, found.epoch, found.begun_at) == (step, (step - 1) // 4, begun_at)
    assert found.logged == dict.fromkeys(range(begun_at + 1, step + 1), True)
    assert found.checkpoint_equal is (True if step % EVERY == 0 else None)
    logged = {row["step"]: row for row in MetricsTracker.read("run/metrics.jsonl").history() if "train/loss" in row}[
        step
    ]
    assert (found.loss, found.learning_rate, found.accepted) == (logged["train/loss"], logged["train/lr"], True)
    assert found.values["grad_norm"] == logged["train/grad_norm"]
    ledger = next(line for line in read_json_lines("run/ledger.jsonl") if line["step"] == step)
    assert [row.source for row in found.rows] == ledger["rows"]
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("step", [3, 8])
@pytest.mark.parametrize("layout", ["padded", "unpadded"])
def test_rows_and_layers_add_up_to_the_step(step: int, layout: str, tmp_path: Path) -> None:
    """The rows' losses, weighted by trained tokens, are the step's; the layers' norms make up the gradient's."""
    run = tmp_path / "run"
    build.train(load_config(overrides=SETTINGS | {"run.directory": str(run), "data.layout": layout}))
    found = replaying.replay(run, step)
    tokens = sum(row.trained_tokens for row in found.rows)
    assert sum(row.loss * row.trained_tokens for row in found.rows) / tokens == pytest.approx(found.loss, rel=1e-6)
    norm = math.sqrt(sum(value**2 for value in found.gradient_norms.values()))
    assert norm == pytest.approx(found.values["grad_norm"], rel=1e-5)
    assert list(found.gradient_norms) == ["layers.0", "layers.1"]
    assert all("sum " in row.example.plain() for row in found.rows)


def test_what_cannot_be_replayed_is_refused(tmp_path: Path) -> None:
    """No run, no such step: one sentence each."""
    for step, message in ((0, "the first step is 1"), (LAST + 1, f"the run ends with step {LAST}")):
        with pytest.raises(ConfigError, match=message):
            replaying.replay("run", step)
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        replaying.replay(tmp_path, 1)


def test_another_base_is_refused_by_name() -> None:
    """What the run was made of must be what it was."""
    path = Path("base/model.safetensors")
    kept = path.read_bytes()
    try:
        tiny_mistral(Path("base"), seed=1)
        with pytest.raises(CheckpointError, match="frozen_parameters"):
            replaying.replay("run", 6)
    finally:
        path.write_bytes(kept)


def test_a_log_that_differs_is_told() -> None:
    """The evidence is not taken for granted."""
    path = Path("run/metrics.jsonl")
    kept = path.read_text()
    try:
        lines = [json.loads(line) for line in kept.splitlines()]
        path.write_text(
            "".join(json.dumps(line | {"train/loss": 1.0} if line["step"] == 6 else line) + "\n" for line in lines)
        )
        found = replaying.replay("run", 6)
    finally:
        path.write_text(kept)
    assert found.logged == {5: True, 6: False}
    assert "the loss of step 5 is the same; what was logged as the loss of step 6 is ANOTHER" in as_text(found)


def test_the_command_prints_the_worst_rows_first(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures, rows by loss, layers, and the text of as many rows as were asked for; or JSON."""
    assert cli.main(["replay", "run", "--step", "6", "--rows", "1"]) == 0
    printed = capsys.readouterr().out
    losses = [float(line.split()[0]) for line in printed.split("row\n")[1].split("\n\n")[0].splitlines()]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 4
    assert printed.count("trained between") == 1
    assert "taken up at the checkpoint of step 4" in printed
    assert cli.main(["replay", "run", "--step", "6", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], len(told["rows"])) == (6, 4)
    assert cli.main(["replay", "nowhere", "--step", "6"]) == 2
    assert capsys.readouterr().err == ("mlx-trainer: nowhere: is not the folder of a run, which has its config.yaml\n")


def test_a_row_that_is_not_a_number_stands_first() -> None:
    """NaN is what one looks for."""
    row = replaying.ReplayedRow("chats.jsonl:1", 9.0, 3, Example("chats.jsonl:1", ()))
    poisoned = attrs.evolve(row, source="chats.jsonl:2", loss=math.nan)
    step = replaying.ReplayedStep(1, 0, 0, math.nan, False, None, {}, (row, poisoned), {}, {}, None)
    lines = as_text(step).splitlines()
    assert "the update was refused" in lines[0]
    assert [line.split()[-1] for line in lines[4:6]] == ["chats.jsonl:2", "chats.jsonl:1"]
