"""Where MLX keeps the kernels that it compiles: `mlx` in the temporary folder, which on Linux all users share.

MLX loads a library that it finds there as it is (tried with 0.32.4 on a CPU), so that whoever made that folder first
could run code in this process.
"""

import os
import stat
import tempfile
from pathlib import Path

_VARIABLES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
"""In the order of C++'s `temp_directory_path`, which MLX asks; Python's own is another."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def private_temporary(own: Path) -> str | None:
    """Return a temporary folder in which nobody else can plant a kernel, None where the present one is such.

    That is `own`, made where it is missing, or else a new one, in which each process compiles its kernels anew.
    """
    present = Path(next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), "/tmp"))
    if is_private(present):
        return None
    try:
        own.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return tempfile.mkdtemp(prefix="mlx-trainer-")
    return str(own) if is_private(own) else tempfile.mkdtemp(prefix="mlx-trainer-")


def is_private(temporary: Path) -> bool:
    """Whether `mlx` in `temporary` is this user's alone and cannot be replaced; it is made so where it is missing.

    Only its owner can move a folder out of one that is "sticky", as /tmp is, except that one's own owner.
    """
    kernels = temporary / "mlx"
    try:
        around = temporary.stat()
        if around.st_uid not in (0, os.getuid()) or (
            around.st_mode & _OTHERS_WRITE and not around.st_mode & stat.S_ISVTX
        ):
            return False
        if not kernels.is_symlink():
            kernels.mkdir(exist_ok=True, mode=0o700)
        found = [path.lstat() for path in (kernels, *kernels.glob("*"), *kernels.glob("*/*"))]
    except OSError:
        return False
    return all(
        stat.S_ISDIR(one.st_mode) and one.st_uid == os.getuid() and not one.st_mode & _OTHERS_WRITE for one in found
    )
