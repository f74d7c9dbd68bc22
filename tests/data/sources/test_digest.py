"""Digests of files: equal for equal content, and remembered only where that is safe."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from mlx_trainer.data.sources import digest
from mlx_trainer.data.sources.digest import file_digest

OLD_NS = 10_000_000_000
WRONG = "0" * 64


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of `file_digest` is ten seconds ahead, so that files written now are old to it."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + OLD_NS)


def record_of(memory: Path) -> Path:
    """The only record of the memory; no other file is there."""
    [record] = memory.iterdir()
    return record


def pretend(memory: Path) -> None:
    """Write a wrong digest into the record, which shows whether it is trusted."""
    record = record_of(memory)
    held = json.loads(record.read_text())
    record.write_text(json.dumps({**held, "sha256": WRONG}))


@pytest.mark.usefixtures("later")
def test_a_second_start_does_not_read(tmp_path: Path) -> None:
    """The digest is that of the content, and comes from the memory as long as the file is the same one."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "new" / "memory"
    path.write_bytes(b"content")
    assert file_digest(path, memory) == file_digest(path) == hashlib.sha256(b"content").hexdigest()
    pretend(memory)
    assert file_digest(path, memory) == WRONG
    assert file_digest(path) != WRONG


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("change", ["content", "size", "time", "file"])
def test_a_changed_file_is_read_again(tmp_path: Path, change: str) -> None:
    """Another size, time or inode is another file, also where content of equal length keeps its modification time."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "memory"
    path.write_bytes(b"content")
    status = path.stat()
    file_digest(path, memory)
    pretend(memory)
    content = {"size": b"longer content", "content": b"tnetnoc"}.get(change, b"content")
    if change == "file":
        path.rename(tmp_path / "b.jsonl")
    path.write_bytes(content)
    if change != "time":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(path, memory) == hashlib.sha256(content).hexdigest()


def test_a_fresh_file_is_not_remembered(tmp_path: Path) -> None:
    """A file changed less than two seconds ago may change again unseen; so may one from the future."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "memory"
    path.write_bytes(b"content")
    file_digest(path, memory)
    assert not memory.exists()
    stamp = digest.stamp_of(path, path.stat())
    for mtime, now, certain in ((0, 2, True), (0, 1.9, False), (1, 2.9, False), (5, 2, False)):
        moved = {**stamp, "ctime_ns": 0, "mtime_ns": int(mtime * 1e9)}
        assert digest.certain(moved, int(now * 1e9)) is certain
        assert digest.certain({**moved, "ctime_ns": moved["mtime_ns"], "mtime_ns": 0}, int(now * 1e9)) is certain


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"stamp": {}, "sha256": "x"}', b'{"sha256": 3}', None],
)
def test_a_damaged_memory_is_no_error(tmp_path: Path, damage: bytes | None) -> None:
    """Damaged records, and one of a digest that is none, are read over and written anew."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "memory"
    path.write_bytes(b"content")
    right = file_digest(path, memory)
    record = record_of(memory)
    whole = record.read_bytes()
    record.write_bytes(whole.replace(right.encode(), b"../../x") if damage is None else damage)
    assert file_digest(path, memory) == right
    assert record_of(memory).read_bytes() == whole


@pytest.mark.usefixtures("later")
def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory that is a file, and a full disk, cost the help only, and leave nothing behind."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "memory"
    path.write_bytes(b"content")
    right = hashlib.sha256(b"content").hexdigest()
    assert file_digest(path, path) == right

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert file_digest(path, memory) == right
    assert list(memory.iterdir()) == []


@pytest.mark.usefixtures("later")
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest of no one state of the file is not remembered."""
    path, memory = tmp_path / "a.jsonl", tmp_path / "memory"
    path.write_bytes(b"content")
    whole = hashlib.file_digest

    def slow(*arguments: object) -> object:
        found = whole(*arguments)  # type: ignore[arg-type]  # as it was called
        path.write_bytes(b"other content")
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    file_digest(path, memory)
    assert not memory.exists()
