"""A folder that is there whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_trainer.folders import discard, locked, sync
from mlx_trainer.models.error import ModelError


@contextmanager
def complete_folder(final: Path) -> Iterator[Path]:
    """Let a folder be filled that then stands at `final`, complete; where anything fails, nothing stands there.

    Raises ModelError where there is something already, or another process writes it now.
    """
    final = final.expanduser().absolute()
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise ModelError(f"{final} exists already; name a new folder, or remove it first.")
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".writing-{final.name}")
    with locked(final.with_name(f".lock-{final.name}")) as held:
        if not held:
            raise ModelError(f"{final} is being written by another process; wait for it, or name another folder.")
        try:
            discard(beside)  # of a process that was killed
            beside.mkdir()
            yield beside
            for path in [*beside.iterdir(), beside]:
                sync(path)
            beside.replace(final)  # an empty folder there is replaced, one with something in it is not
            sync(final.parent)
        finally:
            discard(beside)
