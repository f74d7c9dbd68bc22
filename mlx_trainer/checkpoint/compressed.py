"""Tensor files that take less room: `optimizer.safetensors.zst` in the place of `optimizer.safetensors`."""

import io
from pathlib import Path
from typing import Any

import mlx.core as mx
import safetensors

from mlx_trainer.checkpoint.manifest import CheckpointError
from mlx_trainer.zstd import zstd

SUFFIX = ".zst"
CHUNK = 1 << 16
"""Bytes that are decompressed at once: each can stand for 32,768."""


def check_level(level: int | None, owner: str) -> int | None:
    """Return `level`, from 1 to 19, or None for none. Raises ValueError, or ImportError where Python has no zstd."""
    if level is not None:
        zstd()
        if not 1 <= level <= 19:
            raise ValueError(f"{owner}: compress is {level}; it must be a level from 1 to 19, or None")
    return level


def compress(path: Path, level: int) -> None:
    """Replace a file by what `zstd -d` makes the same bytes of; both are in memory meanwhile.

    Raises ImportError where this Python has no zstd.
    """
    content = zstd().compress(path.read_bytes(), level)
    path.unlink()  # first, so that the disk never has both
    path.with_name(path.name + SUFFIX).write_bytes(content)


def load_tensors(path: Path, most_bytes: int = 0) -> dict[str, Any]:
    """The arrays of a safetensors file, or of the compressed one in its place; evaluated, as `mx.load` is lazy.

    Raises CheckpointError where the compressed one is damaged, holds more than `most_bytes`, or cannot be read by this
    Python.
    """
    if path.exists():
        loaded = mx.load(str(path))
    else:
        content = decompressed(path.with_name(path.name + SUFFIX), most_bytes)
        loaded = mx.load(io.BytesIO(content), format="safetensors")
    assert isinstance(loaded, dict)
    mx.eval(loaded)  # read now, before the file may change
    return loaded


def decompressed(path: Path, most_bytes: int) -> bytes:
    """The content of a compressed safetensors file, its header checked by the safetensors library."""
    parts, size = [], 0
    try:
        module = zstd()
    except ImportError as error:
        raise CheckpointError(f"{path} is compressed with zstd, which this Python cannot read. {error}.") from error
    decompressor = module.new_decompressor()
    try:
        with path.open("rb") as file:
            while (data := file.read(CHUNK)) and size <= most_bytes:
                parts.append(decompressor.decompress(data))
                size += len(parts[-1])
        if size > most_bytes or not decompressor.eof:
            what = f"holds more than {most_bytes:,} bytes" if size > most_bytes else "is cut"
            raise CheckpointError(f"{path} {what}; this run cannot have written it")
        content = b"".join(parts)
        safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except (module.error, safetensors.SafetensorError, EOFError) as error:
        raise CheckpointError(f"{path} is no valid compressed safetensors file: {error}") from error
    return content
