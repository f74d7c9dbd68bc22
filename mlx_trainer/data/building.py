"""Finding the token store of a source, or making it: once, whole or not at all, by one process at a time."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_trainer.data.conversation import DataError
from mlx_trainer.data.jsonl import Line
from mlx_trainer.data.progress import reading
from mlx_trainer.data.recipe import Recipe
from mlx_trainer.data.sources import Source
from mlx_trainer.data.store import FACTS, TokenStore
from mlx_trainer.data.writing import StoreWriter

ENCODED_TOGETHER = 1024
BYTES_TOGETHER = 2 << 20
"""Rows are encoded in parts of at most so many rows, or about so many bytes as they are on disk."""
UNUSED_DAYS = 30
"""Stores that were not opened for so long are removed when another one is made."""

logger = logging.getLogger("mlx_trainer.data")


def open_store(source: Source, recipe: Recipe, cache: Path) -> TokenStore:
    """The store of `source` in the folder `cache`, made if it is not there.

    Raises DataError where the source cannot be read or the store not be written.
    """
    with explained(cache):
        folder = cache / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = source.fingerprint(cache / "files")
        place = folder / recipe.key(fingerprint)
        store = found(place, source.name)
        if store is None:
            with locked(place.with_suffix(".lock"), source.name):
                store = found(place, source.name) or build(source, recipe, place, cache / "files", fingerprint)
        return store


def found(place: Path, name: str) -> TokenStore | None:
    """The store at `place` if it is there and whole, marked as used now."""
    store = TokenStore.open(place, name)
    if store is not None:
        os.utime(place / FACTS)
    return store


def build(source: Source, recipe: Recipe, place: Path, memory: Path, fingerprint: str) -> TokenStore:
    """Make the store of `source` beside `place`, then put it there in one step.

    Raises DataError where the source has another `fingerprint` in the end.
    """
    for remains in (*place.parent.glob(f"{place.name}.*.partial"), *unused(place.parent)):
        shutil.rmtree(remains, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".partial", dir=place.parent))
    try:
        with StoreWriter(beside, recipe) as writer, reading(source) as progress:
            for lines in parts(source.lines(progress)):
                writer.add(lines)
            writer.finish()
        if source.fingerprint(memory) != fingerprint:
            raise DataError(f"{source.location} changed while it was read. Start again when nothing writes to it.")
        shutil.rmtree(place, ignore_errors=True)  # what is there is not whole, or it would have been used
        beside.rename(place)
        sync_folder(place.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    store = TokenStore.open(place, source.name)
    if store is None:
        raise DataError(f"{place} was written, but cannot be read again. Is the disk sound?")
    return store


def parts(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """The lines in parts that are encoded together."""
    part: list[Line] = []
    size = 0
    for line in lines:
        part.append(line)
        size += line.size
        if len(part) == ENCODED_TOGETHER or size > BYTES_TOGETHER:
            yield part
            part, size = [], 0
    if part:
        yield part


def unused(folder: Path) -> Iterator[Path]:
    """The stores in `folder` that were not opened for `UNUSED_DAYS`."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for facts in folder.glob(f"*/{FACTS}"):
        if facts.stat().st_mtime < oldest:
            yield facts.parent


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock at `path`, which the system lets go of when this process ends, however it ends."""
    import fcntl

    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: another process is encoding these rows; waiting for it", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_folder(folder: Path) -> None:
    """Write the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(cache: Path) -> Iterator[None]:
    """Turn an error of the system into a DataError that names the cache and what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"The encoded rows cannot be kept in {cache}: {error.strerror or error}. Free space there, or name "
            "another folder: data.cache_dir, or the environment variable MLX_TRAINER_CACHE."
        ) from error
