import io
import re
from typing import Any

import pytest

from mlx_trainer.callbacks import Evaluation, LambdaCallback, MemoryMonitor, ProgressBar, console, progress_bar
from mlx_trainer.callbacks.progress_text import duration, evaluation_line, header_line, last_line, progress_line
from mlx_trainer.evaluation import EvalMetrics
from tests.callbacks.toy import batches, fit

VALIDATION = batches(2, seed=1)
ERASED = r"(\x1b\[1A\x1b\[2K)*"
COLOUR = re.compile(r"\x1b\[[349]\d")
METRICS = {
    "train/loss": 1.83,
    "train/lr": 9.6e-5,
    "train/tokens_per_second": 812.3,
    "perf/step_ms": 250.0,
    "memory/peak_gb": 4.12,
}


def test_a_line_about_a_step() -> None:
    """Everything a person looks for, in one order."""
    expected = "step 120/600  20%  elapsed 0:42  left 2:48  loss 1.83  lr 9.6e-05  812 tok/s  4.1 GB peak"
    assert progress_line(120, 600, 42.0, 168.0, METRICS) == expected


def test_what_is_not_known_is_left_out() -> None:
    """A run limited by time alone has no total; a module without tokens has no tokens per second."""
    assert progress_line(7, None, 3.2, None, {"train/loss": float("nan")}) == "step 7  elapsed 0:03  loss nan"


def test_little_memory_is_shown_in_megabytes() -> None:
    """A small model's peak is not rounded to nothing."""
    assert progress_line(7, None, 3.2, None, {"memory/peak_gb": 0.2356}) == "step 7  elapsed 0:03  236 MB peak"


def test_lines_about_evaluations_and_the_run() -> None:
    """Perplexity and further metrics stand there by their tags, `best` at the end."""
    metrics = EvalMetrics(0.5, 2, 1.0, metrics={"token_accuracy": 0.75})
    values = "val/loss 0.5  val/perplexity 1.649  val/token_accuracy 0.75"
    assert evaluation_line(100, metrics, best=True) == f"step 100  {values}  best"
    assert evaluation_line(100, metrics, best=False) == f"step 100  {values}"
    assert header_line("Toy", 0, None, 6, 1) == "training Toy from step 1: 6 steps per epoch"
    assert last_line(6, 0.0, 0, "enough", None) == "done: 6 steps in 0:00, enough"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (100_000, "27:46:40")]
)
def test_durations(seconds: float, text: str) -> None:
    """Minutes and seconds, with hours where there are any."""
    assert duration(seconds) == text


def without_times(text: str) -> list[str]:
    """Return the lines with what differs from run to run replaced by a letter."""
    text = re.sub(r"\d+:\d\d", "T", re.sub(r"\d+ tok/s", "N tok/s", re.sub(r"\d+ MB peak", "M MB peak", text)))
    return re.sub(r"(loss|perplexity) [\d.]+", r"\1 L", text).splitlines()


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """A header, a line at each log point and each evaluation, a last line; no control codes."""
    fit([ProgressBar(), Evaluation(every=3)], validation=VALIDATION, run_dir=tmp_path)
    assert without_times(capsys.readouterr().err) == [
        "training Regression from step 1 to 6: 6 steps per epoch",
        "step 2/6  33%  elapsed T  left T  loss L  lr 0.01  N tok/s  M MB peak",
        "step 3  val/loss L  val/perplexity L  best",
        "step 4/6  66%  elapsed T  left T  loss L  lr 0.01  N tok/s  M MB peak",
        "step 6/6  100%  elapsed T  left T  loss L  lr 0.01  N tok/s  M MB peak",
        "step 6  val/loss L  val/perplexity L  best",
        f"done: 6 steps in T, N tok/s, max_epochs=1 reached, result in {tmp_path}",
    ]


def test_a_run_limited_by_time_shows_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a number of steps, max_time tells how long it goes on."""
    stop = LambdaCallback(every=2, on_step_end=lambda trainer, module, step: trainer.request_stop("enough"))
    fit([ProgressBar(), stop], max_time=3630)
    lines = capsys.readouterr().err.splitlines()
    assert re.match(r"step 2  elapsed 0:\d\d  left 1:00:\d\d  loss ", lines[1])


def test_best_is_the_lowest_so_far() -> None:
    """Equal or higher losses, and NaN, are not."""
    bar = ProgressBar()
    trainer, _ = fit([bar])
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_bar, "say", told.append)
        for loss in (float("nan"), 2.0, 2.0, 1.0, 3.0):
            bar.on_evaluation_end(trainer, trainer.module, 1, EvalMetrics(loss, 1, 0.1))
    assert [line.endswith("  best") for line in told] == [False, True, False, True, False]


def terminal(monkeypatch: pytest.MonkeyPatch, no_color: bool) -> io.StringIO:
    """Let the bar believe that it is watched, and return what it draws."""
    from rich.console import Console

    screen = io.StringIO()
    fake = Console(file=screen, force_terminal=True, width=200, no_color=no_color, color_system="standard")
    for module in (progress_bar, console):
        monkeypatch.setattr(module, "stderr_console", lambda: fake)
    monkeypatch.setattr(progress_bar, "stderr_is_terminal", lambda: True)
    return screen


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar's line moves at each redraw, lines about evaluations stand above it, and it is gone at the end."""
    screen = terminal(monkeypatch, no_color=False)
    monkeypatch.setattr(progress_bar, "REDRAW_S", 0.0)
    fit([ProgressBar(), Evaluation(every=3)], validation=VALIDATION)
    text = screen.getvalue()
    assert [f"step {step}/6" in text for step in range(7)] == [True] * 7
    assert "step 3  val/loss" in text
    assert re.fullmatch(ERASED + r"done: 6 steps in 0:\d\d, \d+ tok/s, max_epochs=1 reached\n", text.split("\r")[-1])
    assert COLOUR.search(text)


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR no colour code is written; the bar still moves."""
    screen = terminal(monkeypatch, no_color=True)
    fit([ProgressBar()])
    assert "step 6/6" in screen.getvalue()
    assert not COLOUR.search(screen.getvalue())


def test_between_redraws_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that follows another within a quarter of a second only reads the clock."""
    screen = terminal(monkeypatch, no_color=True)
    fit([ProgressBar()], log_every=6)
    assert [f"step {step}/6" in screen.getvalue() for step in (1, 2, 3, 4, 5, 6)] == [False] * 5 + [True]


def test_the_peak_is_the_monitors_where_there_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Both tell the same number, whatever the order of callbacks."""
    _, result = fit([MemoryMonitor(), ProgressBar()], log_every=6)
    assert f"{1000 * result.metrics['memory/peak_gb']:.0f} MB peak" in capsys.readouterr().err


def test_output_into_a_file_stays_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a script prints while the bar is drawn is not taken from a stdout that is no terminal."""
    screen = terminal(monkeypatch, no_color=True)
    fit([ProgressBar(), LambdaCallback(on_log=lambda trainer, module, step, metrics: print(f"logged {step}"))])
    assert capsys.readouterr().out == "logged 2\nlogged 4\nlogged 6\n"
    assert "logged" not in screen.getvalue()
