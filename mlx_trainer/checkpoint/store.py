"""The checkpoints of a run in a folder: saved, found, kept or removed.

Each is written beside its final name, every file is synced, a manifest with sizes and SHA-256 is written last and all
is read back, the directory is renamed and its parent synced. Only then are older ones removed.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import attrs

from mlx_trainer.checkpoint.compressed import compress
from mlx_trainer.checkpoint.directory import put_in_order, remove, write_directory
from mlx_trainer.checkpoint.finite import NotFiniteError
from mlx_trainer.checkpoint.manifest import CheckpointError, seal, verify
from mlx_trainer.checkpoint.room import check_room
from mlx_trainer.checkpoint.runs import UNKNOWN, make_way, new_run, owner, record_run, recorded_run
from mlx_trainer.folders import holder, locked

logger = logging.getLogger(__name__)

_PREFIX, _LOCK = "step-", ".lock"
OPTIMIZER_FILE = "optimizer.safetensors"
SMALL_FILES = 1 << 16
"""Bytes for position, configuration and manifest, which take some kilobytes."""


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
    compress: int | None = None
    """A level of zstd for the optimizer state."""

    def of_run(self, begin: Path | None, step: int, *, chosen: bool) -> Self:
        """The store of the run that begins at `step` with the checkpoint `begin`, or with none.

        It is that checkpoint's run, and a new one without, and where it goes back, since `begin` was `chosen` among
        newer ones.
        """
        run = None if begin is None else owner(begin)
        newest = max(map(step_of, attrs.evolve(self, run=run).list()), default=0)
        ours = run not in (None, UNKNOWN) and not (chosen and newest > step)
        return attrs.evolve(self, run=run if ours else new_run())

    def expecting(self, parameters: int, optimizer: int, *, best: bool) -> Self:
        """This store, which expects checkpoints of so many bytes of parameters and optimizer state.

        Raises CheckpointError where the disk cannot hold those that are kept, also the `best`, the one being written,
        and the result.
        """
        size = parameters + optimizer + SMALL_FILES
        most = (self.keep_last or 2) + best + 1
        check_room(self.directory, size, max(1, most - len(self.list())), parameters)
        return attrs.evolve(self, expected_bytes=size)

    def begin(self, step: int) -> None:
        """Make the directory this run's where it begins anew, and tell what others have there."""
        if step == 0:
            self.claim()
        if others := self.others():
            message = "%s has %d checkpoints of another run, which stay as they are; resume=%r goes on with the newest"
            logger.warning(message, self.directory, len(others), str(others[-1]))

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
            if self.compress is not None:
                compress(directory / OPTIMIZER_FILE, self.compress)
            seal(directory, self._current_run())
            verify(directory)

        final = self.path(step)
        with self._told(final):
            if self.run is not None and not self.directory.exists():
                logger.warning("%s is not there any more; it is made again", self.directory)
            if (run := self._current_run()) is not None:
                make_way(final, run)
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
        newest = self.newest_good(self.list())
        if newest is None and (paths := self.list()):
            raise CheckpointError(
                f"all {len(paths)} checkpoints in {self.directory} are damaged; move them away to start over"
            )
        return newest

    def before(self, step: int) -> Path | None:
        """The newest checkpoint of this run before `step` that matches its manifest; None where there is none."""
        return self.newest_good([path for path in self.list() if step_of(path) < step])

    @staticmethod
    def newest_good(paths: Sequence[Path]) -> Path | None:
        """The last of `paths` that matches its manifest; damaged ones are passed over with a warning."""
        for path in reversed(paths):
            try:
                verify(path)
            except CheckpointError as error:
                logger.warning("passing over a damaged checkpoint: %s", error)
            else:
                return path
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
            put_in_order(self.directory)
            yield

    def claim(self) -> None:
        """Have the directory say that it is this run's which are to be gone on with."""
        if self.run is not None:
            record_run(self.directory, self.run)

    def _current_run(self) -> str | None:
        return self.run or recorded_run(self.directory)

    def _steps(self) -> Sequence[Path]:
        """What looks like a checkpoint, by step; neither links nor files."""
        pattern = re.compile(rf"{_PREFIX}(\d{{8}}|[1-9]\d{{8,15}})", re.ASCII)
        found = (path for path in self.directory.glob(f"{_PREFIX}*") if pattern.fullmatch(path.name))
        return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)

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
        run = self._current_run()
        ours = [path for path in self._steps() if owner(path) == run]
        for path in ours[: -self.keep_last] if self.keep_last else []:
            if path not in protected:
                try:
                    remove(path)
                except OSError as error:
                    logger.warning("an old checkpoint cannot be removed: %s", error)


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`."""
    return int(path.name.removeprefix(_PREFIX))
