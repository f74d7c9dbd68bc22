"""The checkpoint store: a checkpoint is a directory, complete or absent.

It is written beside its final name, every file is synced, a manifest with sizes and SHA-256 is written last, the
directory is renamed and its parent synced. Only then are older ones removed. Rename without sync is not enough: after a
power cut a complete-looking directory can hold empty files.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import attrs
import mlx.core as mx

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_PREFIX, _TEMPORARY = "step-", ".writing-"


Save = Callable[[], Path]
"""Writes a checkpoint and returns where it is."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be read."""


@attrs.frozen
class CheckpointStore:
    """Checkpoints `step-00000100`, `step-00000200`, … in one directory."""

    directory: Path
    keep_last: int | None = None
    """How many of the newest to keep; None keeps all."""

    def save(self, step: int, write: Callable[[Path], None], protect: Path | None = None) -> Path:
        """Let `write` fill a directory and make it the checkpoint of `step`; then remove what retention does not keep.

        `protect`, for instance the best one, is never removed. Raises CheckpointError, the older checkpoints untouched.
        """

        def fill(directory: Path) -> None:
            write(directory)
            seal(directory)
            verify(directory)

        final = self.directory / f"{_PREFIX}{step:08d}"
        write_directory(final, fill)
        self._remove_old({final, protect})
        return final

    def list(self) -> list[Path]:
        """The checkpoints by step, oldest first; not verified."""
        return sorted(path for path in self.directory.glob(f"{_PREFIX}*") if path.is_dir() and not path.is_symlink())

    def latest(self) -> Path | None:
        """The newest checkpoint that matches its manifest; damaged ones are passed over with a warning.

        Raises CheckpointError where checkpoints exist and all are damaged: starting over would hide the loss.
        """
        paths = self.list()
        for path in reversed(paths):
            try:
                verify(path)
            except CheckpointError as error:
                logger.warning("passing over a damaged checkpoint: %s", error)
            else:
                return path
        if paths:
            raise CheckpointError(
                f"all {len(paths)} checkpoints in {self.directory} are damaged; move them away to start over"
            )
        return None

    def _remove_old(self, protected: set[Path | None]) -> None:
        if self.keep_last is None:
            return
        for path in self.list()[: -self.keep_last]:
            if path not in protected:
                shutil.rmtree(path)


class Saves:
    """The checkpoints of a run on their way to the disk; `tell` hears of each that is complete.

    A save in the background reads arrays that may still be under way when it is added. They are handed to the thread
    only once they are there: that an array is there is noted in the array itself, without a lock (mlx 0.32,
    `array::wait`), so two threads must not wait for the same one: where the thread waited itself, two of three runs of
    3,000 saves ended in a segmentation fault. From then on nobody changes an array, and MLX's own functions may read
    it, and save it, in the thread. It is held until the save is done, so that no later step overwrites or frees it.
    """

    def __init__(self, tell: Callable[[Path], Any]) -> None:
        self._tell = tell
        self._added: list[tuple[Any, Save]] = []
        self._under_way: list[tuple[Any, Future[Path]]] = []
        self._stall_us: float | None = None

    def begin(self, ask: Callable[[], Iterable[Path | None]]) -> None:
        """Let `ask` save, or add what saves in the background, as soon as nothing else is under way."""
        start = time.perf_counter()
        self.follow(wait=True)
        for path in ask():
            if path is not None:
                self._tell(path)
        self._stall_us = 1e6 * (time.perf_counter() - start)
        logger.debug("a checkpoint held the training up for %.0f µs", self._stall_us)

    def add(self, arrays: Any, save: Save) -> None:
        """The thread will call `save` after the next `follow`; `arrays` are all of MLX's that it reads."""
        mx.async_eval(arrays)  # those that no step has dispatched
        self._added.append((arrays, save))

    def follow(self, wait: bool = False) -> None:
        """Tell of what is complete by now, with `wait` of all; raises CheckpointError for what could not be written.

        Waits for the arrays of a new save, so it is called where the step that makes them is over anyway.
        """
        while self._added:
            arrays, save = self._added.pop(0)
            mx.eval(arrays)
            self._under_way.append((arrays, in_writer_thread(save)))
        while self._under_way and (wait or self._under_way[0][1].done()):
            self._tell(self._under_way.pop(0)[1].result())

    @contextmanager
    def all_followed(self) -> Iterator[None]:
        """Leave the block once all is written, also where it fails; then a save that fails too hides no error.

        A second Ctrl-C, which means at once, waits for nothing.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            try:
                self.follow(wait=True)
            except Exception:
                logger.exception("a checkpoint could not be finished")
            raise
        self.follow(wait=True)

    def stall(self) -> dict[str, float]:
        """How long the newest checkpoint held the loop up, in µs, by its TensorBoard tag; once, then nothing.

        What is written in the loop waits for the step first, which counts.
        """
        stall_us, self._stall_us = self._stall_us, None
        return {} if stall_us is None else {"perf/checkpoint_stall_us": stall_us}


def in_writer_thread(save: Save) -> "Future[Path]":
    """Call `save` in the thread that writes, after what it was given before."""
    future: Future[Path] = Future()
    _writer().put((future, save))
    return future


@cache
def _writer() -> "SimpleQueue[tuple[Future[Path], Save]]":
    """The queue of the one thread that writes.

    One for the whole process: a thread that uses MLX starts a stream, and with it a thread of MLX's that never ends.
    A daemon: an interpreter that ends at once must not wait for the disk; what is half written is no checkpoint.
    """
    queue: SimpleQueue[tuple[Future[Path], Save]] = SimpleQueue()

    def work() -> None:
        while True:
            _run(*queue.get())

    threading.Thread(target=work, name="checkpoint-writer", daemon=True).start()
    return queue


def _run(future: "Future[Path]", save: Save) -> None:
    try:
        future.set_result(save())
    except BaseException as error:
        future.set_exception(error)


def write_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory which then stands at `final`, complete, in place of what was there before.

    Raises CheckpointError where the disk does not take it; whatever fails, what was there before stays.
    """
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        _replace(temporary, final)
    except OSError as error:
        raise CheckpointError(f"could not write {final}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def seal(directory: Path) -> None:
    """Write the manifest of all files in `directory`."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        "format_version": FORMAT_VERSION,
        "files": {
            str(path.relative_to(directory)): {"size": path.stat().st_size, "sha256": sha256(path)} for path in files
        },
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def verify(directory: Path) -> None:
    """Raise CheckpointError unless every file that the manifest names is there with its size and SHA-256."""
    for name, entry in _manifest_files(directory).items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{directory}: {name} is missing or is no plain file of this directory")
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, its manifest says {entry['size']}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{path} differs from what was saved (SHA-256)")


def _manifest_files(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} is no complete checkpoint: {MANIFEST} is missing or unreadable ({error})"
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this version of mlx_trainer reads {FORMAT_VERSION}"
        )
    return dict(files)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(temporary: Path, final: Path) -> None:
    """Rename, and sync the parent, so that the new name survives a power cut."""
    aside = final.with_name(f"{_TEMPORARY}old-{final.name}")
    if final.exists():  # the same step again, after a resume
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
