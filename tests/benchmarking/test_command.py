"""`mlx-trainer benchmark`: what it prints, and that it leaves nothing."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cattrs
import pytest
from attrs import evolve

from mlx_trainer import cli, runtime
from mlx_trainer.benchmarking import Comparison, Report, comparing, turns
from mlx_trainer.benchmarking.comparing import Turn
from mlx_trainer.benchmarking.comparison_text import comparison_text, table
from mlx_trainer.config import ConfigError
from mlx_trainer.trainer import TrainingError
from tests.tiny import tiny_mistral

QUICK = (
    "benchmark", "chats.jsonl", "--model", "base", "--model.dtype", "float32", "--model.max_seq_length", "64",
    "--lora.rank", "2", "--training.batch_size", "2", "--training.gradient_accumulation_steps", "2", "--steps", "3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder that holds a tiny model and some chats of uneven length, and is the same afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    tiny_mistral(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": "dog " * n}, {"role": "assistant", "content": f"the sum is {n}"}]}
        for n in range(1, 13)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(Path().rglob("*"))
    yield
    assert sorted(Path().rglob("*")) == before


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what a benchmark prints as JSON."""
    assert cli.main([*QUICK, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("load", [0.0, 1000.0])
def test_every_figure_is_printed(
    load: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each, with the machine, the versions and the command; one more where others used the processor."""
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    assert cli.main(QUICK) == 0
    shown = capsys.readouterr().out
    assert ("load average 1000.0 before it began" in shown) == (load > 0 and runtime.backend() == "cpu")
    lines = [line[2:24].strip() for line in shown.splitlines() if line.startswith("  ") and line[2:24].strip()]
    assert lines == [
        *("model", "data", "machine", "versions", "command", "measured"),
        *("real tokens/s", "trained tokens/s", "computed positions/s", "rows/s"),
        *("mean", "p5, p50, p95", "the host"),
        *("rate", "a token needs", "limit", "reached"),
        *("peak", "of it", "at the end"),
        *("first step done", "of it", "compiled"),
        *("an epoch", "all of it"),
    ]


def test_json_holds_the_same_and_fits_together(capsys: pytest.CaptureFixture[str]) -> None:
    """Sums and shares of what is told are right."""
    found = told(capsys)
    speed, host, memory, ceiling = (found[name] for name in ("speed", "host_ms", "memory", "ceiling"))
    assert (speed["steps"], found["setting"]["train_rows"], found["setting"]["accumulate"]) == (3, 11, 2)
    assert speed["tokens_per_s"] > speed["trained_tokens_per_s"] > speed["rows_per_s"] > 0
    assert speed["padding_share"] == pytest.approx(1 - speed["tokens_per_s"] / speed["positions_per_s"])
    assert found["step_ms"]["mean"] == pytest.approx(1000 * speed["seconds"] / 3)
    assert sum(host.values()) == pytest.approx(found["step_ms"]["mean"])
    assert memory["peak_gb"] == pytest.approx(memory["weights_gb"] + memory["training_gb"] + memory["step_gb"])
    used = speed["tokens_per_s"] * ceiling["flop_per_token"]
    assert ceiling["share"] == pytest.approx(used / ceiling["rate"]["flop_per_s"])
    assert found["start"]["from_process_s"] == pytest.approx(sum(found["start"]["parts"].values()))
    assert found["shapes"]["compiled"] == found["shapes"]["planned"] > 0
    assert found["environment"]["packages"]["mlx"]


def test_options_of_a_training_change_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Full fine-tuning by a recipe, padded, in batches of tokens."""
    recipe = Path("base/recipe.yaml")
    recipe.write_text("training: {method: full, batch_tokens: 128, learning_rate: 1e-5}\n")
    try:
        found = told(capsys, str(recipe), "--data.layout", "padded", "--warmup", "1")
    finally:
        recipe.unlink()
    setting = found["setting"]
    assert (setting["method"], setting["layout"], setting["warmup_steps"]) == ("full", "padded", 1)
    assert (setting["batch_size"], setting["batch_tokens"]) == (None, 128)
    assert setting["trainable"] == setting["parameters"]
    assert found["ceiling"]["flop_per_weight"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "--steps is 0; it must be a whole number, at least 1"),
        (("--warmup", "x"), "argument --warmup: invalid int value: 'x'"),
        (("--model", "./nothing"), "There is no folder ./nothing."),
        (("none.jsonl",), "none.jsonl"),
        (("--rounds", "2"), "--rounds is for --peer, whose turns it counts"),
        (("--peer", "--rounds", "0"), "--rounds is 0; it must be a whole number, at least 1"),
        (("--peer", "--training.method", "dpo"), "--peer: mlx_lm trains on no preferences"),
        (("--peer", "--training.optimizer", "lion"), "--peer: mlx_lm.lora has no optimizer lion"),
        (("--peer", "--training.batch_size", "64"), "--peer: mlx_lm needs 64 rows for a batch, and there are 11"),
        (("--peer", "--model", "./nothing"), "There is no folder ./nothing."),
    ],
)
def test_what_cannot_be_is_one_paragraph_and_code_2(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A turn of the comparison that fails is told in its own words."""
    assert cli.main([*QUICK, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.rpartition("mlx-trainer: ")[2]
    assert "Traceback" not in captured.err


def test_help_names_the_options_and_those_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own and the schema's."""
    with pytest.raises(SystemExit):
        cli.main(["benchmark", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--steps", "--warmup", "--json", "--peer", "--lora.rank", "--model"))


def test_the_peer_takes_turns_and_ratios_are_quotients(capsys: pytest.CaptureFixture[str]) -> None:
    """mlx-lm's trainer runs for real; ours through its figures are the ratios, and both are told."""
    found = told(capsys, "--peer", "--rounds", "2")
    taken, ratios = found["comparison"]["turns"], found["comparison"]["ratios"]
    on_linux_cpu = sys.platform == "linux" and runtime.backend() == "cpu"
    assert list(taken) == ["mlx_trainer", *["mlx_lm_same_blas"] * on_linux_cpu, "mlx_lm"]
    assert list(ratios) == list(taken)[1:]
    ours = taken["mlx_trainer"]
    assert (ours["tokens_per_s"], ours["peak_gb"]) == (found["speed"]["tokens_per_s"], found["memory"]["peak_gb"])
    for name, figures in ratios.items():
        assert {"tokens_per_s", "step_ms", "first_epoch_s"} <= set(figures)
        assert figures == {figure: ours[figure] / taken[name][figure] for figure in figures}
    assert all(turn["cold_first_step_s"] > 0 for turn in taken.values())
    shown = comparison_text(cattrs.structure({"ours": found, "turns": taken}, Comparison))
    header, speeds = shown.splitlines()[-7:-5]
    assert header.split()[0] == "mlx_trainer"
    assert speeds.split()[-1] == f"{ratios['mlx_lm']['tokens_per_s']:.2f}"


def test_the_median_of_several_rounds_is_told() -> None:
    """Of an even number, the slower of the two in the middle."""

    def of(speed: float) -> Any:
        return SimpleNamespace(speed=SimpleNamespace(tokens_per_s=speed))

    for speeds, expected in (([3], 3), ([9, 1, 5], 5), ([9, 1, 5, 7], 5)):
        assert comparing.median([of(speed) for speed in speeds]).speed.tokens_per_s == expected


def test_a_peak_without_the_largest_batch_has_no_ratio() -> None:
    """It is told as the least that it can be."""
    ours = Turn(10.0, 100.0, 2.0, True, 30.0, False, 3.0, 4.0)
    theirs = evolve(ours, peak_gb=1.0, longest_seen=False, epoch_estimated=True)
    taken = {"mlx_trainer": ours, "mlx_lm_same_blas": evolve(theirs, longest_seen=True), "mlx_lm": theirs}
    comparison = Comparison(cast(Report, None), taken)
    assert comparison.ratios("mlx_lm_same_blas")["peak_gb"] == 2
    assert list(comparison.ratios("mlx_lm")) == ["tokens_per_s", "step_ms", "first_epoch_s"]
    rows = {line[:22].strip(): line.split() for line in table(comparison)}
    assert rows["peak memory"][2:] == ["2.00", "GB", "1.00", "GB", "2.00", "at", "least", "1.00", "GB"]
    assert rows["the first epoch"][3:] == ["30.0", "s", *["about", "30.0", "s", "1.00"] * 2]


def test_a_turn_that_fails_has_its_own_words() -> None:
    """Exit codes 1 and 2 are the errors that they stand for; anything else is a mistake of ours, told whole."""

    def output(code: str) -> str:
        return turns.output_of([sys.executable, "-c", code], dict(os.environ))

    assert output("print('figures')") == "figures\n"
    say = "import sys; print('12:00 INFO mlx', 'mlx-trainer: it is wrong', sep='\\n', file=sys.stderr); sys.exit({})"
    with pytest.raises(ConfigError, match=r"^it is wrong$"):
        output(say.format(2))
    with pytest.raises(TrainingError, match=r"^it is wrong$"):
        output(say.format(1))
    with pytest.raises(RuntimeError, match=r"ended with 1:[^$]*ZeroDivisionError"):
        output("1 / 0")
