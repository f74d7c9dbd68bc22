"""Folders that several processes write: a lock that leaves nothing behind, files that are what they seem, syncing."""

import errno
import fcntl
import filecmp
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO

_held: set[IO[str]] = set()


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock at `path`, which the system lets go of when this process ends, however it ends.

    Where another one holds it, `waiting` is called and it is waited for; without `waiting` the result is False. The
    file says who holds it, and is removed in the end, so whoever waited for it holds one that is no longer there, and
    tries again. Raises OSError where the file cannot be made, or the file system has no locks.
    """
    while True:
        with open(path, "a", opener=_following_nothing) as file:
            if not taken(file, waiting):
                yield False
                return
            if is_at(path, file):
                _held.add(file)
                file.write(f"{os.getpid()}\n")  # added: a killed process leaves its line, and a link harms nothing
                file.flush()
                try:
                    yield True
                finally:
                    if file in _held:  # not so in a forked child
                        _held.remove(file)
                        if is_at(path, file):
                            path.unlink()
                return


def taken(file: IO[str], waiting: Callable[[], None] | None) -> bool:
    """Whether the lock of the open `file` is held now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if waiting is None:
            return False
        waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
    return True


def is_at(path: Path, file: IO[str]) -> bool:
    """Whether the open `file` is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def holder(path: Path) -> str:
    """The number of the process that holds the lock at `path`, "unknown" where it has just let go of it."""
    try:
        return path.read_text().split()[-1]
    except (OSError, IndexError):
        return "unknown"


def _let_go() -> None:
    """A forked child must not hold on to the lock when its parent has ended."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)


def open_plain(path: str | Path, folder: int | None = None) -> BufferedReader:
    """Open a file to be read, in the open `folder` if given; never follows a link and never waits for a pipe.

    Raises OSError where it cannot be read, or is no plain file.
    """
    descriptor = _following_nothing(path, os.O_RDONLY, folder)
    file = os.fdopen(descriptor, "rb") if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return file


def _following_nothing(path: str | Path, flags: int, folder: int | None = None) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=folder)


def sync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Put a small file at `path` that survives a power cut, in place of what was there; never half of it."""
    beside = path.with_name(f"{path.name}.new")
    discard(beside)
    with beside.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def discard(path: Path) -> None:
    """Remove what is at `path`, if anything is: a folder with all in it, a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def same_files(folder: Path, other: Path | None) -> bool:
    """Whether `other` has every file of `folder`, byte for byte, and `folder` has one at least."""
    files = [path for path in folder.glob("*") if path.is_file()]
    pairs = [(path, other / path.name) for path in files] if other is not None else []
    return bool(pairs) and all(twin.is_file() and filecmp.cmp(path, twin, shallow=False) for path, twin in pairs)
