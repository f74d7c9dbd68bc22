"""Safetensors files from outside: what the format forbids is refused before MLX sees the file.

MLX takes headers that the format forbids (overlapping, wrapped or fractional offsets, shapes beyond 32 bits), and waits
for ever on a pipe. The format's own library refuses them all.
"""

import os
import stat
from pathlib import Path

_STARTS = {b"PK": "a zip archive, as PyTorch and NumPy write", b"\x80": "a pickle", b"GGUF": "GGUF"}


def check_header(path: Path) -> None:
    """Raise ValueError, which names `path`, where it is no regular file or its header breaks the format's rules.

    Reads and maps the header alone, 20 µs and about half a µs for each tensor; damaged values are not seen.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file{resemblance(path)}: {error!s:.200}") from error


def check_regular(path: Path) -> None:
    """Raise ValueError where `path` cannot be read or is no regular file: opening a pipe or device may never return."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is no regular file; give a plain file in its place")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read: permission denied")


def resemblance(path: Path) -> str:
    """What the first bytes of a file that is no safetensors file look like, for an error's text."""
    with path.open("rb") as file:
        first = file.read(4)
    return next((f" but {kind}" for start, kind in _STARTS.items() if first.startswith(start)), "")
