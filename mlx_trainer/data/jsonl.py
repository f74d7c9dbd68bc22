"""Reading JSONL: one JSON object per line, UTF-8, with the file and line of everything that is wrong."""

import json
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from mlx_trainer.data.conversation import DataError, RowError
from mlx_trainer.data.fields import JsonObject, json_type
from mlx_trainer.data.sources import lines_of

BOM = b"\xef\xbb\xbf"


@frozen
class Line:
    """One line that is not blank: where it stands (`chats.jsonl:12`) and its object, or why it has none."""

    source: str
    value: JsonObject | RowError


def read_jsonl(path: Path, name: str | None = None) -> Iterator[Line]:
    """The lines of `path` that are not blank, told by `name` or else the file's own.

    Raises DataError where the file cannot be read or holds nothing.
    """
    check_file(path)
    name = name or path.name
    empty = True
    for number, line in enumerate(lines_of(path), start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            empty = False
            yield Line(f"{name}:{number}", parse_line(line))
    if empty:
        raise DataError(f"{path} is empty. Give it one JSON object per line, such as {EXAMPLE}.")


EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def check_file(path: Path) -> None:
    """Raise DataError where `path` is missing, no regular file, or not readable."""
    if path.is_dir():
        raise DataError(
            f"{path} is a directory. Give the path of one JSONL file inside it, such as {path / 'x.jsonl'}."
        )
    if not path.exists():
        raise DataError(f"{path} does not exist. Give the path of a JSONL file with one JSON object per line.")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give a file that this user may read.") from error


def parse_line(line: bytes) -> JsonObject | RowError:
    """The JSON object of one line, or what is wrong with it."""
    try:
        value = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON at column {error.colno}: {error.msg}; a row is one JSON object on one line")
    except RecursionError:
        return RowError("JSON nested too deeply to be a row")
    if not isinstance(value, dict):
        return RowError(f"expected a JSON object, got {json_type(value)}")
    return value
