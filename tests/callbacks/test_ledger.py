"""The rows of each step: once each, in order, whatever happens in between."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from mlx_trainer.callbacks import LambdaCallback, Ledger, ModelCheckpoint
from mlx_trainer.monitoring.files import read_json_lines
from tests.callbacks.toy import batches, fit


def test_each_step_has_its_rows(tmp_path: Path) -> None:
    """Those of all micro-batches of the step, in their order, with step and epoch; each row once an epoch."""
    fit([Ledger()], run_dir=tmp_path, accumulate=4, max_epochs=2)
    rows = [row for batch in batches() for row in batch.metadata.rows]
    first = [row for batch in batches()[:4] for row in batch.metadata.rows]
    lines = read_json_lines(tmp_path / "ledger.jsonl")
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert lines[0]["rows"] == lines[2]["rows"] == first
    assert lines[0]["rows"] + lines[1]["rows"] == rows


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    """What came after the checkpoint is cut and written again: the file is that of an unbroken run."""
    saving: Any = {"every": 4, "save_at_end": False}
    fit([Ledger(), ModelCheckpoint(**saving)], run_dir=tmp_path, max_steps=7)
    fit([Ledger(), ModelCheckpoint(**saving)], run_dir=tmp_path, max_steps=11, resume="auto")
    fit([Ledger(tmp_path / "whole.jsonl")], max_steps=11)
    assert (tmp_path / "ledger.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_it_is_on_the_disk_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At `on_checkpoint` of the phase after it, the file was synced, with the line of that very step."""
    synced: list[Path] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")) if Path("/proc").exists() else Path())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    seen: list[tuple[int, int]] = []

    def look(trainer: Any, module: Any, step: int) -> None:
        assert synced == [tmp_path / "ledger.jsonl"]
        seen.append((step, json.loads((tmp_path / "ledger.jsonl").read_text().splitlines()[-1])["step"]))
        synced.clear()

    after = LambdaCallback(on_checkpoint=look, on_step_end=lambda trainer, *_: trainer.request_checkpoint())
    after.phase = "checkpoint"
    fit([after, Ledger()], run_dir=tmp_path, max_steps=3)
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_a_gap_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a resumed run is the first with a ledger, the steps before are not in it."""
    fit([ModelCheckpoint(every=2)], run_dir=tmp_path, max_steps=2)
    fit([Ledger(), ModelCheckpoint(every=2)], run_dir=tmp_path, max_steps=4, resume="auto")
    assert "ledger.jsonl ends at step 0, but the run goes on after step 2" in caplog.text
    assert [line["step"] for line in read_json_lines(tmp_path / "ledger.jsonl")] == [3, 4]


def test_rows_without_names_are_refused(tmp_path: Path) -> None:
    """A ledger that could not be checked is none."""
    unnamed: list[Any] = [evolve(batch, metadata=None) for batch in batches()]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Ledger: the batches do not say which rows they hold"):
        fit([Ledger(tmp_path / "ledger.jsonl")], unnamed)
    assert not (tmp_path / "ledger.jsonl").read_text()
