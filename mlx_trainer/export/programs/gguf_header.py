"""The head of a GGUF file: how many tensors, and what the metadata says; llama.cpp's format, version 2 and 3.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. No tensor is read.
"""

import struct
from pathlib import Path
from typing import IO, Any

from attrs import frozen

from mlx_trainer.models import ModelError

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ENTRIES, MOST_BYTES = 1 << 20, 1 << 24
"""More keys, or a longer text, than any file has: a broken head must not be believed."""


@frozen
class Header:
    """The number of tensors, and the metadata; of an array only how long it is."""

    tensors: int
    metadata: dict[str, Any]


def read_header(path: Path) -> Header:
    """Return the head of the file at `path`; raises ModelError where it is no GGUF file, or cut off in its head."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}.")
            version, tensors, entries = unpacked(file, "IQQ")
            if version not in (2, 3):
                raise ModelError(f"{path} is GGUF of version {version}; 2 and 3 are known.")
            limited(entries, MOST_ENTRIES)
            return Header(tensors, {text(file): value(file, *unpacked(file, "I")) for _ in range(entries)})
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{path} is cut off or broken in its head: {error}.") from error


def unpacked(file: IO[bytes], form: str) -> tuple[Any, ...]:
    """Read numbers, little end first."""
    form = f"<{form}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def text(file: IO[bytes]) -> str:
    """Read a text behind its length in bytes."""
    (size,) = unpacked(file, "Q")
    content = file.read(limited(size, MOST_BYTES))
    if len(content) < size:
        raise ValueError("a text ends too early")
    return content.decode("utf-8", errors="replace")


def value(file: IO[bytes], kind: int) -> Any:
    """Read a value; of an array, which is skipped, the length."""
    if kind == STRING:
        return text(file)
    if kind != ARRAY:
        return unpacked(file, SCALARS[kind])[0]
    inner, size = unpacked(file, "IQ")
    if inner in SCALARS:
        file.seek(size * struct.calcsize(f"<{SCALARS[inner]}"), 1)
    else:
        for _ in range(limited(size, MOST_BYTES)):
            value(file, inner)
    return size


def limited(number: int, most: int) -> int:
    """Return the number; raises ValueError where it is beyond belief."""
    if number > most:
        raise ValueError(f"{number} is more than {most}")
    return number
