"""Preferences on the command line: inspect, train, evaluate, replay."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer import build, cli, replaying
from mlx_trainer.config import load_config
from mlx_trainer.models.adapters import TENSORS
from mlx_trainer.monitoring import MetricsTracker
from tests.tiny import tiny_mistral

SETTINGS = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 128,
    "lora.rank": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.max_steps": 8,
    "training.warmup_steps": 0,
    "training.learning_rate": 3e-2,
    "training.save_steps": 3,
    "training.eval_steps": 4,
    "training.logging_steps": 1,
    "data.dataset_path": "prefs.jsonl",
    "data.train_split": 0.8,
    "run.tensorboard": False,
}
METHODS = ("dpo", "orpo")
RUNS: dict[str, dict[str, object]] = {
    "dpo": {"training.method": "dpo"},
    "orpo": {"training.method": "orpo"},
    "before": {"training.method": "dpo", "preference.precompute_ref_log_probs": True},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which these runs were made."""
    folder = tmp_path_factory.mktemp("preference")
    mx.disable_compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_mistral(folder / "base", hidden_size=32)
        rows = [
            {"prompt": "dog " * (n % 7) + str(n), "chosen": f"the sum is {n}", "rejected": "no idea " * (n % 4 + 1)}
            for n in range(20)
        ]
        Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for run, options in RUNS.items():
            assert build.train(load_config(overrides=SETTINGS | options | {"run.directory": run})).steps == 8
    return folder


@pytest.fixture(autouse=True)
def at_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


@pytest.mark.parametrize("method", METHODS)
def test_evaluate_tells_accuracy_and_margin(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the run's configuration and adapter: on the pairs held back, or on all of a file."""
    told = {}
    for name, files in (("held out", []), ("all", ["prefs.jsonl"])):
        assert cli.main(["evaluate", f"{method}/config.yaml", *files, "--adapter", f"{method}/adapter"]) == 0
        told[name] = dict(line.split() for line in capsys.readouterr().out.splitlines())
        assert list(told[name]) == ["loss", "accuracy", "margin", "rows"]
    assert [told[name]["rows"] for name in told] == ["4", "20"]
    assert float(told["all"]["accuracy"]) == 1.0
    assert float(told["all"]["margin"]) > 0.02
    assert cli.main(["evaluate", f"{method}/config.yaml"]) == 2
    assert "is evaluated with an adapter; name its --adapter" in capsys.readouterr().err


def test_an_adapter_is_one_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained on preferences generates as every adapter does."""
    config = json.loads(Path("dpo/adapter/adapter_config.json").read_text())
    assert (config["fine_tune_type"], config["lora_parameters"]["rank"]) == ("lora", 2)
    assert Path("dpo/adapter", TENSORS).is_file()
    model = ("--model", "base", "--model.dtype", "float32", "--max-tokens", "4", "--prompt", "dog 3")
    answers = []
    for adapter in ([], ["--adapter", "dpo/adapter"]):
        assert cli.main(["generate", *model, *adapter]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]


def test_inspect_shows_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are counted as pairs, and each is shown with both its answers."""
    model = ("--model", "base", "--model.dtype", "float32", "--model.max_seq_length", "128")
    assert cli.main(["inspect", "prefs.jsonl", *model, "--training.method", "dpo", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("20 rows (0 bad, 0 dropped, 0 truncated): 18 to train on, 2 held out\n")
    assert "chosen answers have" in text
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("prefs.jsonl")] == [
        "prefs.jsonl:1 chosen",
        "prefs.jsonl:1 rejected",
    ]
    assert "⟦ the sum is 0</s>⟧" in text
    assert "⟦ no idea no idea" not in text.split("prefs.jsonl:1 rejected")[0]


@pytest.mark.parametrize("method", METHODS)
def test_no_perplexity_is_told(method: str) -> None:
    """exp of a preference's loss means nothing; what a run logs of the held-out pairs is loss, rewards and the rest."""
    lines = [json.loads(line) for line in Path(method, "metrics.jsonl").read_text().splitlines()]
    told = {name for line in lines for name in line if name.startswith("val/")}
    assert {"val/loss", "val/rewards/accuracies", "val/rewards/margins"} < told
    assert "val/perplexity" not in told


def test_a_reference_computed_before_is_the_same() -> None:
    """The run logs the losses of one whose steps run the base, to rounding."""
    losses = {run: MetricsTracker.read(Path(run, "metrics.jsonl")).series("train/loss")[1] for run in ("dpo", "before")}
    assert losses["before"] == pytest.approx(losses["dpo"], rel=1e-4)
    assert len({*losses["dpo"]}) == 8


@pytest.mark.parametrize("run", RUNS)
def test_a_step_is_replayed_with_the_loss_of_each_pair(run: str) -> None:
    """Bit for bit the run's own; both rows of a pair have the pair's loss, and the pairs' mean is the step's loss."""
    step = replaying.replay(run, 5)
    assert step.logged[5]
    losses = [row.loss for row in step.rows]
    assert losses[::2] == losses[1::2]
    assert len(set(losses)) == len(losses) // 2
    assert sum(losses) / len(losses) == pytest.approx(step.loss, rel=1e-5)
