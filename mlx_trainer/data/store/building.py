"""Finding the token store of a source, or making it: once, whole or not at all, by one process at a time."""

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.sources.find import Source
from mlx_trainer.data.store.parsing import parsed_parts
from mlx_trainer.data.store.progress import reading
from mlx_trainer.data.store.recipe import Recipe
from mlx_trainer.data.store.store import FACTS, TokenStore
from mlx_trainer.data.store.writing import StoreWriter
from mlx_trainer.folders import locked, sync

UNUSED_DAYS = 30
"""Stores that were not opened for so long are removed when another one is made."""
PARTIAL = ".partial"

logger = logging.getLogger("mlx_trainer.data")


def open_store(source: Source, recipe: Recipe, cache: Path) -> TokenStore:
    """The store of `source` in the folder `cache`, made if it is not there.

    Raises DataError where the source cannot be read or the store not be written.
    """

    def waiting() -> None:
        logger.info("%s: another process is encoding these rows; waiting for it", source.name)

    with explained(cache):
        folder = cache / "tokens"
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = source.fingerprint(cache / "files")
        place = folder / recipe.key(fingerprint)
        store = found(place, source.name)
        if store is None:
            with locked(lock_of(place), waiting):
                store = found(place, source.name) or build(source, recipe, place, cache / "files", fingerprint)
        return store


def found(place: Path, name: str) -> TokenStore | None:
    """The store at `place` if it is there and whole, marked as used now."""
    store = TokenStore.open(place, name)
    if store is not None:
        with suppress(OSError):  # a cache that can only be read is read
            os.utime(place / FACTS)
    return store


def build(source: Source, recipe: Recipe, place: Path, memory: Path, fingerprint: str) -> TokenStore:
    """Make the store of `source` beside `place`, then put it there in one step.

    Raises DataError where the source has another `fingerprint` in the end.
    """
    tidy(place)
    beside = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=PARTIAL, dir=place.parent))
    try:
        with StoreWriter(beside, recipe) as writer, reading(source) as progress:
            for rows in parsed_parts(source, recipe, progress):
                writer.add(rows)
            writer.finish()
        if source.fingerprint(memory) != fingerprint:
            raise DataError(f"{source.location} changed while it was read. Start again when nothing writes to it.")
        shutil.rmtree(place, ignore_errors=True)  # what is there is not whole, or it would have been used
        beside.rename(place)
        sync(place.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    store = TokenStore.open(place, source.name)
    if store is None:
        raise DataError(f"{place} was written, but cannot be read again. Is the disk sound?")
    return store


def tidy(place: Path) -> None:
    """Remove the stores beside `place` that nobody used for long, and what killed processes left half made."""
    oldest = time.time() - UNUSED_DAYS * 86400
    for facts in place.parent.glob(f"*/{FACTS}"):
        with suppress(FileNotFoundError):  # another process tidies up too
            if facts.stat().st_mtime < oldest:
                shutil.rmtree(facts.parent, ignore_errors=True)
    for remains in place.parent.glob(f"*{PARTIAL}"):
        made_for = place.with_name(remains.name.split(".")[0])
        if made_for == place:  # whose lock is held by this process
            shutil.rmtree(remains, ignore_errors=True)
            continue
        with locked(lock_of(made_for)) as nobody_makes_it:
            if nobody_makes_it:
                shutil.rmtree(remains, ignore_errors=True)


def lock_of(place: Path) -> Path:
    """The lock that is held while the store at `place` is made."""
    return place.with_suffix(".lock")


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
