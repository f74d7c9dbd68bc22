"""Reading lines: numbers, encodings and what is no JSON object."""

from pathlib import Path

import pytest

from mlx_trainer.data.conversation import DataError
from mlx_trainer.data.jsonl import read_jsonl
from tests.data.conftest import WriteRows


def test_lines_keep_their_numbers(write_rows: WriteRows) -> None:
    """A byte order mark and blank lines are skipped without shifting the numbers; Windows line ends are fine."""
    path = write_rows([b"\xef\xbb\xbf" + '{"text": "é"}'.encode(), b"", b"  \t", b'{"text": "b"}\r'])
    assert [(line.source, line.value) for line in read_jsonl(path)] == [
        ("chats.jsonl:1", {"text": "é"}),
        ("chats.jsonl:4", {"text": "b"}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "broken JSON at column 13: Expecting ',' delimiter; a row is one JSON object on one line"),
        (b"[1]", "expected a JSON object, got a list"),
        (b"null", "expected a JSON object, got null"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11 of the line; save the file as UTF-8"),
        (b"[" * 100_000, "JSON nested too deeply to be a row"),
    ],
)
def test_what_is_wrong_with_a_line(write_rows: WriteRows, line: bytes, message: str) -> None:
    """A line that is no JSON object is told with its reason, and the next one is read all the same."""
    bad, good = read_jsonl(write_rows([line, {"text": "fine"}]))
    assert (bad.source, str(bad.value)) == ("chats.jsonl:1", message)
    assert good.value == {"text": "fine"}


def test_files_that_cannot_be_read(tmp_path: Path, write_rows: WriteRows) -> None:
    """A missing file, a directory and an empty file are refused with what would be right."""
    for path, message in (
        (tmp_path / "no.jsonl", r"no\.jsonl does not exist\. Give the path"),
        (tmp_path, "is a directory. Give the path of one JSONL file"),
        (write_rows([b"", b"   "]), "is empty. Give it one JSON object per line, such as"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_jsonl(path))
