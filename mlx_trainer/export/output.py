"""A folder that is there whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_trainer.folders import discard, sync


@contextmanager
def fresh_folder(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` to be written, which becomes `output` at the end, and is removed on an error.

    Raises OSError where `output` is a file, or has something in it already: nothing is ever overwritten.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(errno.EEXIST, "is there already; give a new or empty folder", str(output))
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f".{output.name}.{os.getpid()}.new")
    new.mkdir()
    try:
        yield new
        for path in new.iterdir():
            sync(path)
        new.replace(output)  # an empty folder may be replaced
        sync(output.parent)
    finally:
        discard(new)
