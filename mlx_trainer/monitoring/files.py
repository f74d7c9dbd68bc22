"""Files that a run leaves for other programs: written whole or not at all, or a line at a time.

JSON has no numbers for what is not finite, so they are written as the strings "NaN", "Infinity" and "-Infinity", which
JavaScript, Python's `float` and pandas' `to_numeric` read back as the numbers they were. Files are UTF-8; what has no
form there (half of a surrogate pair) becomes an escape such as `\\ud800`, which JSON reads back as it was.
"""

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from mlx_trainer.monitoring.error import MonitoringError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def make_folder(path: str | Path) -> Path:
    """Create a folder and those above it; raise MonitoringError with the reason where that cannot be done."""
    folder = Path(path)
    with explained("create the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomic(path: str | Path, text: str) -> Path:
    """Write a text file beside its final name and rename it: readers meet the old file or the new one, never half."""
    path = Path(path)
    make_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    with explained("write", path):
        try:
            with beside.open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    return path


class JsonLines:
    """A file of one JSON object a line, appended to and flushed per record, so that a killed run keeps what it told.

    A last line that a killed run left half written is cut off when the file is opened again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        make_folder(self.path.parent)
        with explained("write", self.path):
            _cut_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system: about 10 µs, no wait for the disk."""
        self._file.write(to_json(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, without a last line that is torn.

    Raises MonitoringError with file and line for any other line that is not a JSON object.
    """
    path = Path(path)
    with explained("read", path):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        record = _parsed(line)
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):
            raise MonitoringError(f"{path}:{number}: not a JSON object: {line[:60]!r}")
    return records


def to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON text of anything: numbers that are not finite by name, and what JSON has no form for as its text."""
    return json.dumps(_plain(value), allow_nan=False, ensure_ascii=False, indent=indent)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    return _plain_float(float(value)) if isinstance(value, numbers.Real) else str(value)


def _plain_float(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _cut_torn_line(path: Path) -> None:
    """Make the file end with a line break: after its last line where that is whole, else in its place."""
    content = path.read_bytes() if path.exists() else b""
    start = content.rfind(b"\n") + 1
    if tail := content[start:].decode("utf-8", "replace"):
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            if _parsed(tail) is None:
                file.truncate(start)
            else:
                file.write(b"\n")


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a MonitoringError that says what could not be done with what."""
    try:
        yield
    except OSError as error:
        raise MonitoringError(f"cannot {action} {path}: {error.strerror}") from error
