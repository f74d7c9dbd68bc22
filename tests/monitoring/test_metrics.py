"""The history of metrics: by step, as text, as a picture, as TensorBoard files."""

import builtins
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer.monitoring import JsonLines, MetricsTracker, MonitoringError


@pytest.fixture
def tracker() -> MetricsTracker:
    """Three steps, recorded out of order, one of them in two parts."""
    tracker = MetricsTracker()
    tracker.record(20, {"train/loss": 1.25, "train/lr": 2e-4})
    tracker.record(10, {"train/loss": 2.5, "train/lr": 1e-4})
    tracker.record(20, {"val/loss": 1.5})
    tracker.record(30, {"train/loss": math.nan})
    return tracker


def test_history_has_a_row_for_each_step_in_order(tracker: MetricsTracker) -> None:
    """What was recorded for one step in two calls is one row, and a row has only what was recorded."""
    rows = tracker.history()
    assert rows[:2] == [
        {"step": 10, "train/loss": 2.5, "train/lr": 1e-4},
        {"step": 20, "train/loss": 1.25, "train/lr": 2e-4, "val/loss": 1.5},
    ]
    assert list(rows[2]) == ["step", "train/loss"]
    assert math.isnan(rows[2]["train/loss"])
    assert tracker.series("train/lr") == ([10, 20], [1e-4, 2e-4])


def test_a_step_done_again_after_resuming_replaces_the_first(tracker: MetricsTracker) -> None:
    """The later value of a step counts, the others stay."""
    tracker.record(20, {"train/loss": 1.0})
    assert tracker.history()[1] == {"step": 20, "train/loss": 1.0, "train/lr": 2e-4, "val/loss": 1.5}


def test_the_table_is_aligned_text(tracker: MetricsTracker) -> None:
    """Columns are aligned right, missing values are empty, and steps without any chosen metric are left out."""
    assert tracker.table().splitlines() == [
        "step  train/loss  train/lr  val/loss",
        "  10         2.5    0.0001",
        "  20        1.25    0.0002       1.5",
        "  30         nan",
    ]
    assert tracker.table(["val/loss"]).splitlines() == ["step  val/loss", "  20       1.5"]


def test_an_unknown_metric_is_refused_with_the_nearest_name(tracker: MetricsTracker) -> None:
    """The error says what was asked for and what comes near, or all there is."""
    with pytest.raises(MonitoringError, match="no metric 'val/los' was recorded; did you mean 'val/loss'"):
        tracker.series("val/los")
    with pytest.raises(MonitoringError, match="there are train/loss, train/lr, val/loss"):
        tracker.series("accuracy")


values = st.floats(width=64) | st.sampled_from([math.nan, math.inf, -math.inf])
names = st.text(min_size=1).filter(lambda name: name not in ("step", "time"))


# No deadline: what is slow here is the disk.
@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.integers(0, 10**9), st.dictionaries(names, values, min_size=1), max_size=5))
def test_metrics_come_back_from_disk_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, recorded: dict[int, dict[str, float]]
) -> None:
    """A file of records read again gives the same history, numbers that are not finite included."""
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    tracker = MetricsTracker()
    with JsonLines(path) as lines:
        for step, row in recorded.items():
            tracker.record(step, row)
            lines.write({"step": step, "time": "2026-01-01T00:00:00+00:00", **row})
    assert repr(MetricsTracker.read(path).history()) == repr(tracker.history())


def test_a_record_without_a_step_is_named(tmp_path: Path) -> None:
    """Reading says which record has no step that is a whole number."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": "2", "train/loss": 1.0}\n')
    with pytest.raises(MonitoringError, match=r"metrics\.jsonl: record 2 has no whole number as \"step\": '2'"):
        MetricsTracker.read(path)


def test_tensorboard_reads_the_same_scalars_at_the_same_steps(tracker: MetricsTracker, tmp_path: Path) -> None:
    """TensorBoard's own reader finds every tag with the recorded steps and values (float32)."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    tracker.to_tensorboard(tmp_path / "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert sorted(found) == ["train/loss", "train/lr", "val/loss"]
    assert found["val/loss"] == [(20, 1.5)]
    assert found["train/loss"][:2] == [(10, 2.5), (20, 1.25)]
    assert math.isnan(found["train/loss"][2][1])
    assert found["train/lr"] == [(10, pytest.approx(1e-4, rel=1e-7)), (20, pytest.approx(2e-4, rel=1e-7))]


def test_a_plot_is_a_png_and_matplotlib_stays_as_it_was(tracker: MetricsTracker, tmp_path: Path) -> None:
    """The picture is written where asked, into a new folder, and pyplot is not even imported."""
    pytest.importorskip("matplotlib", reason="needs the plot extra")
    had_pyplot = "matplotlib.pyplot" in sys.modules
    path = tracker.plot("train/loss", tmp_path / "plots" / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert path.stat().st_size > 5_000
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_without_matplotlib_the_extra_is_named(
    tracker: MetricsTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to install, and no file is made."""
    real = builtins.__import__

    def without_matplotlib(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MonitoringError, match=r"pip install 'mlx-trainer\[plot\]'"):
        tracker.plot("train/loss", tmp_path / "plots" / "loss.png")
    assert list(tmp_path.iterdir()) == []
