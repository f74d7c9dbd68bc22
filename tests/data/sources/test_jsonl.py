"""Reading lines: numbers, encodings and what is no JSON object."""

from pathlib import Path

import pytest

from mlx_trainer.data.samples.conversation import DataError, RowError
from mlx_trainer.data.sources.files import FileSource
from tests.data.conftest import WriteRows


def test_lines_keep_their_numbers(write_rows: WriteRows) -> None:
    """A byte order mark and blank lines are skipped without shifting the numbers; Windows line ends are fine."""
    path = write_rows([b"\xef\xbb\xbf" + '{"text": "é"}'.encode(), b"", b"  \t", b'{"text": "b"}\r'])
    assert [(line.number, line.value) for line in FileSource.of(path).lines()] == [
        (1, {"text": "é"}),
        (4, {"text": "b"}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "broken JSON at column 13: Expecting ',' delimiter; a row is one JSON object on one line"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"null", "expected a JSON object, got null"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11 of the line; save the file as UTF-8"),
        (b"[" * 100_000, "JSON nested too deeply to be a row; 100 levels are read"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "JSON nested too deeply to be a row; 100 levels are read"),
        (b'{"text": "a", "score": NaN}', "NaN is no JSON; write null where a value is missing"),
        (b'{"text": "a", "score": [-Infinity]}', "-Infinity is no JSON; write null where a value is missing"),
        (b'{"a": {"role": 1, "role": 1}}', "duplicate key 'role'; leave one of the two out"),
        (b'{"a\\ud800": 1, "a\\ud800": 2}', "duplicate key 'a\\ud800'; leave one of the two out"),
        (b'{"id": ' + b"9" * 5000 + b"}", "a number with thousands of digits; write it as text"),
        (
            b'{"text": "\x00"}',
            "broken JSON at column 11: Invalid control character at; a row is one JSON object on one line",
        ),
        ('{"text": "a"}'.encode("utf-16"), "invalid UTF-8 at byte 1 of the line; save the file as UTF-8"),
    ],
)
def test_what_is_wrong_with_a_line(write_rows: WriteRows, line: bytes, message: str) -> None:
    """A line that is no JSON object is told with its reason, and the next one is read all the same."""
    bad, good = FileSource.of(write_rows([line, {"text": "fine"}])).lines()
    assert (bad.number, str(bad.value)) == (1, message)
    assert (good.number, good.value) == (2, {"text": "fine"})


@pytest.mark.parametrize(
    "row",
    [
        {"text": "\x00 and \u2028"},
        {"text": "a", "score": 1e300, "id": 10**4000},
        {"text": "x" * 10_000_000},
        {"text": "[{" * 5000, "tree": [[[[{}]]]]},
        {f"{key}": [] for key in range(100_000)},
    ],
)
def test_unusual_rows(write_rows: WriteRows, row: dict[str, object]) -> None:
    """What is JSON is read as it is: NUL as an escape, numbers, long lines, brackets in a text, many keys."""
    assert [line.value for line in FileSource.of(write_rows([row, {"text": "b"}])).lines()] == [row, {"text": "b"}]


def test_the_deepest_row(write_rows: WriteRows) -> None:
    """A hundred levels are read, whoever calls."""
    row: object = "bottom"
    for _ in range(99):
        row = [row]
    [line] = FileSource.of(write_rows([{"row": row}])).lines()
    assert line.value == {"row": row}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_lines_that_are_too_long(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """A line beyond the limit is told and not held in memory; those around it are read, wherever the parts end."""
    monkeypatch.setattr("mlx_trainer.data.sources.files.CHUNK", chunk)
    monkeypatch.setattr("mlx_trainer.data.sources.jsonl.MAX_LINE", 1000)
    fits, long = {"text": "x" * 988}, {"text": "x" * 989}
    values = [line.value for line in FileSource.of(write_rows([fits, long, {"text": "b"}, long])).lines()]
    told = "longer than 1,000 bytes; a row is one JSON object on one line"
    assert [str(v) if isinstance(v, RowError) else v for v in values] == [fits, told, {"text": "b"}, told]


def test_files_that_cannot_be_read(tmp_path: Path, write_rows: WriteRows) -> None:
    """A missing file, a directory and an empty file are refused with what would be right."""
    for path, message in (
        (tmp_path / "no.jsonl", r"no\.jsonl does not exist\. Give the path"),
        (tmp_path, "is a directory. Give the path of one JSONL file"),
        (write_rows([b"", b"   "]), "is empty. Give it one JSON object per line, such as"),
    ):
        with pytest.raises(DataError, match=message):
            list(FileSource.of(path).lines())
