"""Files as sources: which are refused, what progress is told, and when a file has changed."""

import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.sources.files import FileSource, read_parts
from tests.data.conftest import WriteRows

ROWS = [{"text": f"row {number}"} for number in range(2000)]


def make_socket(path: Path) -> None:
    """A socket at `path`."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]) -> None:
    """Pipes, sockets and devices are refused at once: reading one may wait forever, or never end."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make(Path("x.jsonl"))
    source = FileSource.of(Path("x.jsonl"))
    for use in (source.fingerprint, lambda: next(source.lines())):
        with pytest.raises(
            DataError, match=r"^x\.jsonl is no regular file but a pipe, socket or device\. Save the rows"
        ):
            use()


def test_links_and_paths_that_lead_nowhere(tmp_path: Path, write_rows: WriteRows) -> None:
    """A link to a file is that file; a dangling one, a loop, a file as a folder and a NUL are told."""
    real = FileSource.of(write_rows(ROWS[:3]))
    link = tmp_path / "link.jsonl"
    link.symlink_to(real.path)
    assert list(FileSource.of(link).lines()) == list(real.lines())
    assert FileSource.of(link).fingerprint() == real.fingerprint()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (
        ("dangling", "does not exist"),
        ("loop", "cannot be read: "),
        ("link.jsonl/x", "does not exist"),
        ("a\0b", "is no path: "),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        for use in (FileSource.of(tmp_path / name).fingerprint, FileSource.of(tmp_path / name).lines().__next__):
            with pytest.raises(DataError, match=message):
                use()


@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_progress_adds_up_to_the_size(
    tmp_path: Path, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, suffix: str, chunk: int
) -> None:
    """Progress is told in bytes on disk, little by little, and ends at the size; the lines are those without it."""
    for module in ("files", "zstd"):
        monkeypatch.setattr(f"mlx_trainer.data.sources.{module}.CHUNK", chunk)
    content = write_rows(ROWS).read_bytes()
    compress: Callable[[bytes], bytes] = gzip.compress if suffix == ".gz" else bytes
    if suffix == ".zst":
        compress = pytest.importorskip(
            "zstandard", reason="before Python 3.14 zstd takes the zstandard package"
        ).compress
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(compress(content[:9999]) + compress(content[9999:]))
    source, told = FileSource.of(path), list[int]()
    assert [line.value for line in source.lines(told.append)] == ROWS
    assert sum(told) == source.size_hint() == path.stat().st_size
    assert all(count > 0 for count in told)
    assert len(told) > 9 or chunk > 64 or suffix == ".gz"  # gzip reads ahead


def test_a_file_that_changes_meanwhile(write_rows: WriteRows) -> None:
    """Rows of two states of a file are no data; what cannot be told of a missing file is None."""
    source = FileSource.of(write_rows(ROWS))
    lines = source.lines()
    next(lines)
    with source.path.open("ab") as file:
        file.write(b'{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"changed while it was read\. Start again when nothing writes to it"):
        list(lines)
    source.path.unlink()
    assert source.size_hint() is None


def test_equal_content_has_one_fingerprint(write_rows: WriteRows, tmp_path: Path) -> None:
    """The name does not count, the content does; the memory makes no difference."""
    one, same, other = (
        FileSource.of(write_rows(rows, name)) for name, rows in (("a", ROWS), ("b", ROWS), ("c", ROWS[1:]))
    )
    assert one.fingerprint() == same.fingerprint() == one.fingerprint(tmp_path / "memory") != other.fingerprint()


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """A file whose name is no Unicode can be read, and its rows' name be printed."""
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    try:
        path.write_bytes(b'{"text": "a"}\n')
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    source = FileSource.of(path)
    assert source.name == "caf\\udce9.jsonl"
    assert (len(list(source.lines())), len(source.fingerprint())) == (1, 64)
    source.location.encode()


def test_a_small_file_makes_no_large_part(tmp_path: Path) -> None:
    """A compressed file of a few kilobytes that stands for hundreds of megabytes is read in parts of 32 MB at most."""
    zstandard = pytest.importorskip("zstandard", reason="writing zstd before Python 3.14 takes the zstandard package")
    for name, compressed in (
        ("zst", zstandard.compress(bytes(200_000_000))),
        ("gz", gzip.compress(bytes(200_000_000), compresslevel=1)),
    ):
        path = tmp_path / f"zeros.jsonl.{name}"
        path.write_bytes(compressed)
        sizes = [len(part) for part in read_parts(path)]
        assert sum(sizes) == 200_000_000
        assert max(sizes) <= 1 << 25
