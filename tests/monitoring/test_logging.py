"""Log lines on the console and on disk."""

import io
import json
import logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer.monitoring import MonitoringError, setup_logging
from mlx_trainer.monitoring.logging import MAX_BYTES

TOKEN = "hf_" + "AbCdEfGh1234" * 3
log = logging.getLogger("mlx_trainer.data")


@pytest.fixture(autouse=True)
def leave_nothing_behind() -> Iterator[None]:
    """Take every test's set-up down, and prove that the loggers are as they were."""
    logger = logging.getLogger("mlx_trainer")
    before = (logger.level, logger.propagate, list(logger.handlers), list(logging.getLogger().handlers))
    yield
    setup_logging(console=False).close()
    assert (logger.level, logger.propagate, list(logger.handlers), list(logging.getLogger().handlers)) == before


def records(path: Path) -> list[dict[str, Any]]:
    """Return the file's lines, parsed."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_on_disk_are_json_with_their_fields_and_errors_have_a_file_of_their_own(tmp_path: Path) -> None:
    """train.jsonl has every record from the level up, errors.jsonl only the errors, with their traceback."""
    with setup_logging(tmp_path, level="info", console=False):
        log.debug("too fine")
        log.info("read %d rows", 7, extra={"step": 3, "loss": float("nan"), "path": Path("a.jsonl")})
        assert not (tmp_path / "logs/errors.jsonl").exists()
        try:
            raise RuntimeError("no more\nrows")
        except RuntimeError:
            log.exception("stopped")
    first, second = records(tmp_path / "logs/train.jsonl")
    time = first.pop("time")
    assert time.endswith("+00:00")
    assert "T" in time
    expected = {"level": "INFO", "logger": "mlx_trainer.data", "message": "read 7 rows"}
    assert first == expected | {"step": 3, "loss": "NaN", "path": "a.jsonl"}
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("RuntimeError: no more\nrows")
    assert records(tmp_path / "logs/errors.jsonl") == [second]


def test_a_file_is_rotated_when_it_would_pass_10_mb(tmp_path: Path) -> None:
    """The record that does not fit any more begins a new file, and no line is torn or lost."""
    with setup_logging(tmp_path, console=False):
        for number in range(22):
            log.info("%d %s", number, "x" * 500_000)
    old, new = tmp_path / "logs/train.jsonl.1", tmp_path / "logs/train.jsonl"
    assert MAX_BYTES - 501_000 < old.stat().st_size <= MAX_BYTES
    assert [int(record["message"].split()[0]) for file in (old, new) for record in records(file)] == list(range(22))


def test_five_old_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many small files the newest and the five before it are left, in order."""
    monkeypatch.setattr("mlx_trainer.monitoring.logging.MAX_BYTES", 150)
    with setup_logging(tmp_path, console=False):
        for number in range(9):
            log.info("%d", number)
    left = {file.name: [record["message"] for record in records(file)] for file in (tmp_path / "logs").iterdir()}
    assert left == {"train.jsonl": ["8"]} | {f"train.jsonl.{age}": [str(8 - age)] for age in range(1, 6)}


def test_without_a_terminal_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """stderr gets time, level and message, no control characters, and stdout nothing."""
    with setup_logging():
        log.warning("row %s: [bold]no role[/bold]", 4)
    captured = capsys.readouterr()
    time, _, rest = captured.err.partition(" ")
    assert len(time) == 8
    assert time.count(":") == 2
    assert rest == "WARNING row 4: [bold]no role[/bold]\n"
    assert captured.out == ""


@pytest.mark.parametrize("no_color", ["", "1"], ids=["colour", "NO_COLOR"])
def test_on_a_terminal_rich_writes_and_no_color_takes_the_colours_away(no_color: str) -> None:
    """A pseudo-terminal gets coloured levels, or the same words without colour where NO_COLOR is set."""
    program = "from mlx_trainer.monitoring import setup_logging; import logging; setup_logging()\n"
    program += "logging.getLogger('mlx_trainer.x').warning('see [bold] 12')"
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color, "COLUMNS": "100"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")])
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stderr=theirs, env=environment, check=True)
    with io.FileIO(ours) as terminal:
        shown = terminal.read(4096)
    os.close(theirs)
    assert shown is not None
    assert b"see [bold] 12" in shown
    assert b"WARNING" in shown
    assert (b"\x1b[3" in shown) == (no_color == "")


def test_a_second_set_up_replaces_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines appear once, in the newer folder and at the newer level; closing ends both."""
    first = setup_logging(tmp_path / "a")
    second = setup_logging(tmp_path / "b", level="WARNING")
    log.info("unseen")
    log.error("seen")
    second.close()
    log.error("after the end")
    assert [record["message"] for record in records(tmp_path / "b/logs/train.jsonl")] == ["seen"]
    assert records(tmp_path / "a/logs/train.jsonl") == []
    assert capsys.readouterr().err.count("seen") == 1
    first.close()


def test_a_programs_own_root_handler_does_not_print_a_line_again(capsys: pytest.CaptureFixture[str]) -> None:
    """With our console on, records stay out of the root logger; without it they reach it as ever."""
    root = logging.getLogger()
    own = logging.StreamHandler()
    own.setFormatter(logging.Formatter("root: %(message)s"))
    root.addHandler(own)
    try:
        with setup_logging():
            log.warning("once")
        with setup_logging(console=False):
            log.warning("theirs")
    finally:
        root.removeHandler(own)
    printed = capsys.readouterr().err
    assert printed.count("once") == 1
    assert "root: once" not in printed
    assert "root: theirs" in printed


def test_access_tokens_are_masked_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token in message, argument, extra field or traceback, of either kind, is not written."""
    monkeypatch.setenv("HF_TOKEN", "an-odd-secret")
    with setup_logging(tmp_path):
        try:
            raise ValueError(f"401 for {TOKEN}")
        except ValueError:
            log.exception("with %s and an-odd-secret, hf_hub_download stays", TOKEN, extra={"token": TOKEN})
    written = [(tmp_path / "logs" / name).read_text() for name in ("train.jsonl", "errors.jsonl")]
    for text in [*written, capsys.readouterr().err]:
        assert TOKEN not in text
        assert "an-odd-secret" not in text
        assert "with [hidden] and [hidden], hf_hub_download stays" in text


def test_wrong_levels_and_folders_are_refused_before_anything_changes(tmp_path: Path) -> None:
    """Both errors name what was given, and the set-up before goes on."""
    (tmp_path / "file").write_text("")
    with setup_logging(tmp_path, console=False):
        with pytest.raises(MonitoringError, match="unknown log level 'LOUD'; right are DEBUG, INFO"):
            setup_logging(level="LOUD")
        with pytest.raises(MonitoringError, match=r"cannot create the folder .*file/logs"):
            setup_logging(tmp_path / "file")
        log.info("still here")
    assert [record["message"] for record in records(tmp_path / "logs/train.jsonl")] == ["still here"]
