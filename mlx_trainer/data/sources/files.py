"""Files of rows: JSONL, plain or compressed with gzip or zstd."""

import gzip
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from attrs import frozen

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.sources.digest import file_digest
from mlx_trainer.data.sources.jsonl import EXAMPLE, Line, json_lines
from mlx_trainer.data.sources.zstd import zstd_parts

CHUNK = 1 << 20
"""Bytes that are read at once."""

Progress = Callable[[int], None]
"""Told how many units of `size_hint` were read since the last call."""


@frozen
class FileSource:
    """A file of rows, and how its rows name it: `chats.jsonl`, or the path where another file has that name too."""

    path: Path
    name: str
    weight: float = 1.0

    @classmethod
    def of(cls, path: Path) -> Self:
        """The file at `path`, named as it is."""
        return cls(path, printable(path.name))

    @property
    def full_name(self) -> str:
        """The path, as text that can be printed whatever its bytes are."""
        return printable(self.path)

    @property
    def location(self) -> str:
        """The path, for messages about the file as a whole."""
        return printable(self.path)

    def lines(self, progress: Progress | None = None) -> Iterator[Line]:
        """The lines that are not blank; `progress` is told the bytes on disk that were read.

        Raises DataError where the file cannot be read, is damaged, holds no row, or changes meanwhile.
        """
        check_file(self.path)
        before = self.path.stat()
        empty = True
        for line in json_lines(read_parts(self.path, progress)):
            empty = False
            yield line
        if empty:
            raise DataError(f"{self.path} is empty. Give it one JSON object per line, such as {EXAMPLE}.")
        after = self.path.stat()
        if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
            raise DataError(f"{self.path} changed while it was read. Start again when nothing writes to it.")

    def fingerprint(self, memory: Path | None = None) -> str:
        """The SHA-256 of the file as it is stored, from the folder `memory` where it knows it; raises DataError."""
        check_file(self.path)
        try:
            return file_digest(self.path, memory)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def size_hint(self) -> int | None:
        """Bytes on disk, None where they cannot be told."""
        try:
            return self.path.stat().st_size
        except (OSError, ValueError):
            return None


def printable(path: Path | str) -> str:
    """`path` as Unicode text, with `\\udcff` for a byte that is none."""
    return str(path).encode(errors="backslashreplace").decode()


def check_file(path: Path) -> None:
    """Raise DataError where `path` is missing, no regular file (reading a pipe may wait forever), or not readable."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
            return
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{path} does not exist. Give the path of a JSONL file with one JSON object per line."
        ) from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no path: {error}. Give the path of a JSONL file.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if stat.S_ISDIR(mode):
        raise DataError(
            f"{path} is a directory. Give the path of one JSONL file inside it, such as {path / 'x.jsonl'}."
        )
    raise DataError(f"{path} is no regular file but a pipe, socket or device. Save the rows as a file and give that.")


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(f"{path} cannot be read: {error.strerror or error}. Give a file that this user may read.")


def read_parts(path: Path, progress: Progress | None = None) -> Iterator[bytes]:
    """The content of `path`, decompressed by its suffix, in parts; raises DataError where it is damaged."""
    told = 0
    with path.open("rb") as file:
        for part in intact_parts(path, file):
            yield part
            if progress is not None and (position := file.tell()) >= told + CHUNK:
                progress(position - told)
                told = position
        if progress is not None and (position := file.tell()) > told:
            progress(position - told)


def intact_parts(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The parts of the open `file`; raises DataError where it is damaged."""
    try:
        yield from parts_of(path, file)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no valid gzip file: {error}. Compress it anew with `gzip`.") from error
    except EOFError as error:
        raise DataError(f"{path} ends in the middle of its compressed data. Copy or compress it anew.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def parts_of(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of the open `file`, decompressed by the suffix of its `path`."""
    if path.suffix == ".zst":
        yield from zstd_parts(path, file)
    elif path.suffix == ".gz":
        with gzip.open(file) as decompressed:
            yield from iter(lambda: decompressed.read(CHUNK), b"")
    else:
        yield from iter(lambda: file.read(CHUNK), b"")
