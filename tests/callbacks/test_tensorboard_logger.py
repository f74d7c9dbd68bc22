import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlx_trainer.callbacks import Evaluation, GradientClipping, MemoryMonitor, ModelCheckpoint, TensorBoardLogger
from tests.callbacks.toy import batches, fit

VALIDATION = batches(2, seed=1)


def read(directory: Path) -> Any:
    """Return TensorBoard's own reader of a folder, loaded."""
    reader = EventAccumulator(str(directory))
    reader.Reload()
    return reader


def test_tensorboard_reads_every_tag(tmp_path: Path) -> None:
    """The tags are those of the metrics, the x axis is the optimizer step, the values are the logged ones."""
    callbacks = [TensorBoardLogger(), GradientClipping(), MemoryMonitor(), Evaluation()]
    _, result = fit(callbacks, validation=VALIDATION, run_dir=tmp_path, accumulate=2, log_every=1)
    reader = read(tmp_path / "tensorboard")
    expected = {
        "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "perf/step_ms",
        "memory/peak_gb", "memory/active_gb", "memory/cache_gb", "val/loss", "val/perplexity",
    }  # fmt: skip
    assert expected - set(reader.Tags()["scalars"]) == set()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3]
    assert reader.Scalars("train/loss")[-1].value == pytest.approx(result.metrics["train/loss"], rel=1e-6)
    assert [event.step for event in reader.Scalars("val/loss")] == [3]


def test_a_resumed_run_hides_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    """Each step has one point, though the first run went beyond the checkpoint."""
    for max_epochs in (1, 2):
        callbacks = [TensorBoardLogger(), ModelCheckpoint(every=4, save_at_end=False)]
        fit(callbacks, run_dir=tmp_path, max_epochs=max_epochs, resume="auto")
    assert [event.step for event in read(tmp_path / "tensorboard").Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]


def test_what_was_logged_is_in_the_file_at_once(tmp_path: Path) -> None:
    """Nothing waits in memory, where a kill would lose it: TensorBoard's reader sees each log while the run goes on."""
    seen = []

    class Looking(MemoryMonitor):
        phase = "checkpoint"  # after the logger

        def on_log(self, trainer: Any, module: Any, step: int, metrics: dict[str, float]) -> None:
            seen.append([event.step for event in read(tmp_path).Scalars("train/loss")])

    fit([TensorBoardLogger(tmp_path), Looking()])
    assert seen == [[2], [2, 4], [2, 4, 6]]


def test_files_are_read_in_the_order_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs within the same second, and with a clock that was put back: the last run's values are those that show."""
    clock = [2e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for max_steps in (5, 6):
        callbacks = [TensorBoardLogger(), ModelCheckpoint(every=2, save_at_end=False)]
        fit(callbacks, run_dir=tmp_path, max_steps=max_steps, resume="auto")
    clock[0] -= 1000
    fit([TensorBoardLogger()], run_dir=tmp_path, resume=tmp_path / "checkpoints" / "step-00000002")
    assert [event.step for event in read(tmp_path / "tensorboard").Scalars("train/loss")] == [2, 4, 6]


def test_texts_are_kept_by_step(tmp_path: Path) -> None:
    """log_text is there for callbacks that have words; without a run it does nothing."""
    logger = TensorBoardLogger(tmp_path)

    class Speaking(MemoryMonitor):
        def on_log(self, trainer: Any, module: Any, step: int, metrics: dict[str, float]) -> None:
            logger.log_text("note", f"at {step}", step)

    logger.log_text("note", "before", 0)
    fit([logger, Speaking()])
    events = read(tmp_path).Tensors("note/text_summary")
    assert [(event.step, event.tensor_proto.string_val[0]) for event in events] == [
        (2, b"at 2"), (4, b"at 4"), (6, b"at 6"),
    ]  # fmt: skip


def test_the_file_is_closed_after_a_failure(tmp_path: Path) -> None:
    """What was logged before an error is on the disk when fit has raised it."""

    class Breaking(MemoryMonitor):
        def on_log(self, trainer: Any, module: Any, step: int, metrics: dict[str, float]) -> None:
            if step == 4:
                raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit([TensorBoardLogger(tmp_path), Breaking()])
    assert [event.step for event in read(tmp_path).Scalars("train/loss")] == [2]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Before training, by name."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into this folder") as caught:
        fit([TensorBoardLogger(tmp_path / "file")])
    assert caught.value.filename == str(tmp_path / "file")
