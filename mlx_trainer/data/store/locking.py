"""A lock between processes that leaves nothing behind."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock at `path`, which the system lets go of when this process ends, however it ends.

    Where another one holds it, `waiting` is called and it is waited for; without `waiting` the result is False. The
    file is removed in the end, so whoever waited for it holds one that is no longer there, and tries again.
    """
    while True:
        with path.open("a") as file:
            if not taken(file, waiting):
                yield False
                return
            if is_at(path, file):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
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
