import json
import math
from pathlib import Path

import pytest

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import Evaluation, MemoryMonitor, MetricsLogger, ModelCheckpoint
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring import MetricsTracker
from mlx_trainer.trainer import Trainer
from tests.callbacks.toy import Regression, batches, fit

VALIDATION = batches(2, seed=1)


def read(path: Path) -> list[dict[str, object]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_per_log_and_per_evaluation(tmp_path: Path) -> None:
    """Each line has step, epoch, time and the metrics by tag, those that other callbacks added included."""
    _, result = fit([MetricsLogger(), Evaluation(), MemoryMonitor()], validation=VALIDATION, run_dir=tmp_path)
    lines = read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["epoch"]) for line in lines] == [(2, 0.3333), (4, 0.6667), (6, 1.0), (6, 1.0)]
    assert {name: lines[2][name] for name in result.metrics} == result.metrics
    assert {name: lines[3][name] for name in ("val/loss", "val/perplexity")} == result.evaluation.as_dict()
    assert "memory/peak_gb" in lines[0]
    times = [float(str(line["time"])) for line in lines]
    assert times == sorted(times)


def test_a_path_of_its_own(tmp_path: Path) -> None:
    """`path` is used as it is, its folder made."""
    fit([MetricsLogger(tmp_path / "deep" / "m.jsonl")])
    assert [line["step"] for line in read(tmp_path / "deep" / "m.jsonl")] == [2, 4, 6]


def test_records_reach_the_file_at_once(tmp_path: Path) -> None:
    """A run that breaks off has told everything up to its last log."""
    with pytest.raises(RuntimeError):
        fit([MetricsLogger(tmp_path / "m.jsonl"), Breaking()])
    assert [line["step"] for line in read(tmp_path / "m.jsonl")] == [2]


class Breaking(Callback):
    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Fail at the third step, when the second was logged."""
        if step == 3:
            raise RuntimeError("broken")


def test_numbers_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    """A NaN loss is the string "NaN", which MetricsTracker reads as the number."""
    fit([MetricsLogger(tmp_path / "m.jsonl")], batches(nan_at=0), log_every=6)
    (line,) = read(tmp_path / "m.jsonl")
    assert line["train/loss"] == "NaN"
    assert math.isnan(MetricsTracker.read(tmp_path / "m.jsonl").series("train/loss")[1][0])


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """Lines after the checkpoint are dropped and written again, those before stay; time goes on."""

    def callbacks() -> list[MetricsLogger | ModelCheckpoint]:
        return [MetricsLogger(), ModelCheckpoint(every=4, save_at_end=False)]

    fit(callbacks(), run_dir=tmp_path)
    before = read(tmp_path / "metrics.jsonl")
    fit(callbacks(), run_dir=tmp_path, max_epochs=2, resume="auto")
    after = read(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in before] == [2, 4, 6]
    assert [line["step"] for line in after] == [2, 4, 6, 8, 10, 12]
    assert after[:2] == before[:2]
    state = json.loads((tmp_path / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert float(str(after[2]["time"])) > state["seconds"]


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    """Without a resume, what an older run wrote there is dropped: two histories in one file would be neither."""
    for _ in range(2):
        fit([MetricsLogger(), Evaluation(at_start=True)], validation=VALIDATION, run_dir=tmp_path)
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0, 2, 4, 6, 6]


def test_validate_alone_writes_nothing(tmp_path: Path) -> None:
    """trainer.validate returns its metrics; the history belongs to training."""
    Trainer(callbacks=[MetricsLogger()], run_dir=tmp_path / "run").validate(Regression(), VALIDATION)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """Before training, by name."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write into this folder") as caught:
        fit([MetricsLogger(tmp_path / "file" / "m.jsonl")])
    assert caught.value.filename == str(tmp_path / "file")
