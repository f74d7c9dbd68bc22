"""The digest of a file's content, remembered, so that a second start does not read ten gigabytes again."""

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from pathlib import Path

logger = logging.getLogger("mlx_trainer.data")

Stamp = dict[str, int | str]
"""What tells, without reading it, that a file is the one it was: path, size, times and inode."""

UNSURE_NS = 2_000_000_000
"""A file that was changed less than this before its digest was taken may be changed again within the same tick of its
file system's clock, unseen; so git takes a file of the index for "racily clean", too."""


def file_digest(path: Path, memory: Path | None = None) -> str:
    """The SHA-256 of the bytes of `path` as they are stored, from the folder `memory` where it knows them.

    A memory that is damaged or cannot be written is no error. Raises OSError where `path` cannot be read.
    """
    record = (
        None if memory is None else memory / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]}.json"
    )
    if record is not None and (known := recall(record, stamp_of(path, path.stat()))) is not None:
        return known
    start = time.time_ns()
    with path.open("rb") as file:
        before = stamp_of(path, os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = stamp_of(path, os.fstat(file.fileno()))
    if record is not None and before == after and certain(before, start):
        remember(record, before, digest)
    return digest


def stamp_of(path: Path, status: os.stat_result) -> Stamp:
    """The stamp of the file at `path`."""
    return {
        "path": os.fsencode(path.absolute()).decode(errors="backslashreplace"),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def certain(stamp: Stamp, now: int) -> bool:
    """Whether a file of this stamp, read from `now` on, cannot have changed since and kept its stamp."""
    return all(int(stamp[key]) + UNSURE_NS <= now for key in ("mtime_ns", "ctime_ns"))


def recall(record: Path, stamp: Stamp) -> str | None:
    """The digest that `record` holds for exactly this stamp, None where it holds none."""
    try:
        held = json.loads(record.read_bytes())
        if held["stamp"] == stamp and re.fullmatch("[0-9a-f]{64}", held["sha256"]):
            return str(held["sha256"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        logger.debug("%s tells no digest: %r", record, error)
    return None


def remember(record: Path, stamp: Stamp, digest: str) -> None:
    """Write `record`, whole or not at all."""
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=record.parent, prefix=".digest-")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump({"stamp": stamp, "sha256": digest}, file)
            os.replace(name, record)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        logger.debug("%s is not written: %s", record, error)
