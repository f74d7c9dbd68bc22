"""The checkpoint store: a checkpoint is a directory, complete or absent.

It is written beside its final name, every file is synced, a manifest with sizes and SHA-256 is written last and all is
read back, the directory is renamed and its parent synced. Only then are older ones removed, under another name first.
Rename without sync is not enough: after a power cut a complete-looking directory can hold empty files.

A folder may hold checkpoints of several runs, where it was used again. Each says in its manifest which run it is of,
and the folder says which run is to be gone on with; those of others are left as they are.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

import attrs

from mlx_trainer.finite import NotFiniteError
from mlx_trainer.folders import discard, holder, locked, open_plain, sync, write_synced
from mlx_trainer.manifest import FORMAT_VERSION, MANIFEST, CheckpointError, run_of, seal, verify

__all__ = ["FORMAT_VERSION", "MANIFEST", "CheckpointError", "CheckpointStore", "seal", "verify", "write_directory"]

logger = logging.getLogger(__name__)

_PREFIX, _TEMPORARY, _REPLACED, _REMOVED = "step-", ".writing-", ".replaced-", ".removed-"
_RUN, _LOCK = ".run", ".lock"


@attrs.frozen
class CheckpointStore:
    """Checkpoints `step-00000100`, `step-00000200`, … in one directory."""

    directory: Path
    keep_last: int | None = None
    """How many of the newest to keep; None keeps all."""
    run: str | None = None
    """The id of the run that saves here; None: the one that the directory is said to be of."""
    expected_bytes: int | None = None
    """What a checkpoint will take, where that is known: for the error of a full disk."""

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is, or would be."""
        return self.directory / f"{_PREFIX}{step:08d}"

    def save(self, step: int, write: Callable[[Path], None], protect: Path | None = None) -> Path:
        """Let `write` fill a directory and make it the checkpoint of `step`; then remove what retention does not keep.

        `protect`, for instance the best one, is never removed, nor is what another run saved. Raises CheckpointError,
        the older checkpoints untouched.
        """

        def fill(directory: Path) -> None:
            write(directory)
            seal(directory, self._current_run())
            verify(directory)

        final = self.path(step)
        with self._told(final):
            self._make_way(final)
            write_directory(final, fill)
            self.claim()
        self._remove_old({final, protect})
        return final

    def list(self) -> list[Path]:
        """The checkpoints of this run by step, oldest first, and those that do not say whose they are; not verified."""
        run = self._current_run()
        return [path for path in self._steps() if run is None or owner(path) in (run, UNKNOWN)]

    def others(self) -> Sequence[Path]:
        """The checkpoints of other runs, by step."""
        ours = self.list()
        return [path for path in self._steps() if path not in ours]

    def latest(self) -> Path | None:
        """The newest checkpoint of this run that matches its manifest; damaged ones are passed over with a warning.

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

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no other run write here, and put in order what a killed one left.

        Raises CheckpointError, naming the process, where another run has it, or where the file system has no locks.
        """
        lock = self.directory / _LOCK
        with ExitStack() as stack:
            try:
                ours = stack.enter_context(locked(lock))
            except OSError as error:
                raise CheckpointError(f"{lock} cannot be locked: {error.strerror}") from error
            if not ours:
                raise CheckpointError(
                    f"{self.directory} is being written by process {holder(lock)}; wait until that run has ended, or "
                    "give this one a directory of its own"
                )
            self._put_in_order()
            yield

    def claim(self) -> None:
        """Have the directory say that it is this run's which are to be gone on with."""
        path, text = self.directory / _RUN, f"{self.run}\n"
        if self.run is not None and not (
            path.is_file() and not path.is_symlink() and path.read_bytes() == text.encode()
        ):
            write_synced(path, text)

    def check_room(self, needed: int, what: str) -> None:
        """Raise CheckpointError unless the disk has `needed` bytes for `what`, and takes a checkpoint now.

        Quotas, and limits on the size of a file, show only when something is written.
        """
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"{self.directory} has room for {free:,} bytes; this run needs {needed:,} for {what}: free some, keep "
                "fewer checkpoints (keep_last), or name a directory on another disk"
            )
        if self.expected_bytes and hasattr(os, "posix_fallocate"):  # not so on macOS
            try:
                with tempfile.TemporaryFile(dir=self.directory) as file:
                    os.posix_fallocate(file.fileno(), 0, self.expected_bytes)
            except OSError as error:
                raise CheckpointError(
                    f"{self.directory} cannot take a checkpoint of {self.expected_bytes:,} bytes: {error.strerror}; "
                    "raise that limit, or name a directory on another disk"
                ) from error

    def _current_run(self) -> str | None:
        if self.run is not None:
            return self.run
        path = self.directory / _RUN
        try:
            with open_plain(path) as file:
                run = file.read(100).decode(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if not re.fullmatch(r"[0-9a-f]{32}\n", run):
            raise CheckpointError(
                f"{path}, which says whose checkpoints are to be gone on with, is damaged; remove it, and the newest "
                "of any run are"
            )
        return run.strip()

    def _steps(self) -> Sequence[Path]:
        """What looks like a checkpoint, by step; neither links nor files."""
        pattern = re.compile(rf"{_PREFIX}(\d{{8}}|[1-9]\d{{8,15}})", re.ASCII)
        found = (path for path in self.directory.glob(f"{_PREFIX}*") if pattern.fullmatch(path.name))
        return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)

    def _make_way(self, final: Path) -> None:
        """Another run's checkpoint of the same step gets another name."""
        run = self._current_run()
        if self.run is not None and not self.directory.exists():
            logger.warning("%s is not there any more; it is made again", self.directory)
        elif run is not None and final.is_dir() and owner(final) not in (run, UNKNOWN):
            names = (final.with_name(f"other-{final.name}" + f"-{n}" * (n > 1)) for n in count(1))
            other = next(path for path in names if not os.path.lexists(path))
            final.rename(other)
            logger.warning("%s is another run's; it is %s now", final, other.name)

    @contextmanager
    def _told(self, final: Path) -> Iterator[None]:
        """Add to an error what only the store knows."""
        try:
            yield
        except NotFiniteError as error:
            newest = self.latest()
            good = "there is no good checkpoint yet" if newest is None else f"the newest good one is {newest}"
            raise CheckpointError(f"{final} was not saved: {error}; {good}") from error
        except OSError as error:
            raise CheckpointError(f"could not write {final}: {error}") from error
        except CheckpointError as error:
            if self.expected_bytes is None or not isinstance(error.__cause__, OSError | RuntimeError):
                raise
            raise CheckpointError(f"{error}; it takes about {self.expected_bytes:,} bytes") from error.__cause__

    def _remove_old(self, protected: set[Path | None]) -> None:
        """What is being removed has another name meanwhile: half of it must not look like a checkpoint."""
        run = self._current_run()
        ours = [path for path in self._steps() if owner(path) == run]
        for path in ours[: -self.keep_last] if self.keep_last else []:
            if path not in protected:
                doomed = path.with_name(f"{_REMOVED}{path.name}")
                try:
                    discard(doomed)
                    path.rename(doomed)
                    discard(doomed)
                except OSError as error:
                    logger.warning("an old checkpoint cannot be removed: %s", error)

    def _put_in_order(self) -> None:
        """Remove what killed saves left; what one was about to replace is a checkpoint again."""
        for prefix in (_REPLACED, _TEMPORARY, _REMOVED):
            for path in self.directory.glob(f"{prefix}*"):
                _put_back(self.directory / path.name.removeprefix(prefix))
                discard(path)


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`."""
    return int(path.name.removeprefix(_PREFIX))


UNKNOWN = "unknown"
"""The owner of a checkpoint that does not say."""


def owner(path: Path) -> str | None:
    """The id of the run that wrote a checkpoint, None where it has none, UNKNOWN where its manifest is damaged."""
    try:
        return run_of(path)
    except CheckpointError:
        return UNKNOWN


def write_directory(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory which then stands at `final`, complete, in place of what was there before.

    Raises CheckpointError where the disk does not take it; whatever fails, what was there before stays.
    """
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    try:
        _put_back(final)
        discard(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        _replace(temporary, final)
    except CheckpointError:
        raise
    except (OSError, RuntimeError) as error:  # MLX has the latter for files that it cannot write
        raise CheckpointError(f"could not write {final}: {error}{_room(temporary)}") from error
    finally:
        discard(temporary)


def _replace(temporary: Path, final: Path) -> None:
    """Rename, and sync the parent, so that the new name survives a power cut."""
    if os.path.lexists(final):  # the same step again, after a resume
        final.rename(final.with_name(f"{_REPLACED}{final.name}"))
    temporary.rename(final)
    sync(final.parent)
    discard(final.with_name(f"{_REPLACED}{final.name}"))


def _put_back(final: Path) -> None:
    """Where a save was killed between the two renames, what it was about to replace stands at `final` again."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if os.path.lexists(final):
        discard(replaced)
    elif os.path.lexists(replaced):
        replaced.rename(final)


def _room(temporary: Path) -> str:
    """How much was written, and how much still fits."""
    try:
        written = sum(path.lstat().st_size for path in temporary.rglob("*"))
        return f" ({written:,} bytes of it were written, {shutil.disk_usage(temporary).free:,} are free there)"
    except OSError:
        return ""
