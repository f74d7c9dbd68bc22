"""Files written whole, and lines of JSON that survive a killed run."""

import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.monitoring import JsonLines, MonitoringError, read_json_lines, write_atomic
from mlx_trainer.monitoring.files import make_folder, to_json


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    """The new text stands under the name, with the mode of any new file, in a folder that was made for it."""
    path = tmp_path / "new" / "facts.json"
    write_atomic(path, "first, and longer\n")
    assert write_atomic(path, "zweite Fassung ü\n") == path
    assert path.read_text(encoding="utf-8") == "zweite Fassung ü\n"
    assert [file.name for file in path.parent.iterdir()] == ["facts.json"]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_text_that_has_no_utf8_form_is_written_with_escapes(tmp_path: Path) -> None:
    """Half of a surrogate pair, as a row may hold it, stands as JSON's escape and comes back."""
    with JsonLines(tmp_path / "samples.jsonl") as lines:
        lines.write({"prompt": "ü \ud800"})
    assert read_json_lines(tmp_path / "samples.jsonl") == [{"prompt": "ü \ud800"}]
    assert write_atomic(tmp_path / "page.html", "ü \ud800").read_text(encoding="utf-8") == "ü \\ud800"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full at the last moment leaves the old text, no partial file, and an error that names the file."""
    path = write_atomic(tmp_path / "facts.json", "old\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MonitoringError, match=r"cannot write .*facts\.json: No space left on device"):
        write_atomic(path, "new\n")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("facts.json", "old\n")]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the folder's place gives one error with path and reason."""
    (tmp_path / "runs").write_text("")
    with pytest.raises(MonitoringError, match=r"cannot create the folder .*runs/demo: Not a directory"):
        make_folder(tmp_path / "runs" / "demo")


def test_every_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """Another reader sees each record before the file is closed, and a second opening appends."""
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as lines:
        lines.write({"step": 1, "text": "two\nlines"})
        assert read_json_lines(path) == [{"step": 1, "text": "two\nlines"}]
    with JsonLines(path) as lines:
        lines.write({"step": 2})
    assert read_json_lines(path) == [{"step": 1, "text": "two\nlines"}, {"step": 2}]


@pytest.mark.parametrize(
    ("left", "steps"),
    [(b'{"step": 1}\n{"step": 2', [1, 3]), (b'{"step": 1}\n{"step": 2}', [1, 2, 3]), (b'{"text": "\xc3', [3])],
    ids=["torn", "without line break", "torn character"],
)
def test_a_line_that_a_killed_run_left_torn_is_passed_over_and_cut_off(
    tmp_path: Path, left: bytes, steps: list[int]
) -> None:
    """Reading stops before the torn line; writing on puts the next record on a line of its own."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(left)
    assert [record["step"] for record in read_json_lines(path)] == steps[:-1]
    with JsonLines(path) as lines:
        lines.write({"step": 3})
    assert [record["step"] for record in read_json_lines(path)] == steps


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    """What is no JSON object, but not the torn end either, is an error with file and line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n\n[3]\n{"step": 2}\n')
    with pytest.raises(MonitoringError, match=r"metrics\.jsonl:3: not a JSON object: '\[3\]'"):
        read_json_lines(path)
    with pytest.raises(MonitoringError, match=r"cannot read .*absent\.jsonl: No such file"):
        read_json_lines(tmp_path / "absent.jsonl")


def test_json_has_no_numbers_that_are_not_finite() -> None:
    """Such numbers become their names, NumPy's become plain ones, and other things their text: strict JSON in all."""
    value = {
        "a": math.nan,
        "b": [math.inf, (-math.inf,)],
        "c": np.float32(0.5),
        "d": np.int64(3),
        5: Path("x"),
        "f": True,
    }
    expected = {"a": "NaN", "b": ["Infinity", ["-Infinity"]], "c": 0.5, "d": 3, "5": "x", "f": True}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected


@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_records_come_back_as_they_were(record: dict[str, object]) -> None:
    """Any object of plain values is one line, and parses to the same object."""
    line = to_json(record)
    assert "\n" not in line
    assert json.loads(line) == record
