"""The content of a file compressed with zstd."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.zstd import Decompressor, zstd

CHUNK = 1 << 10
"""Bytes that are read at once: each of them can stand for 32,768, so that no file makes a part above 32 MB."""


def zstd_parts(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of the open `file`, all its frames; raises DataError where `path` is damaged or nothing can read it.

    Raises EOFError where its last frame is cut.
    """
    try:
        module = zstd()
    except ImportError as error:
        raise DataError(
            f"{path} is compressed with zstd, which this Python cannot read. {error}, or compress it with gzip."
        ) from error
    try:
        yield from decompressed(file, module.new_decompressor)
    except module.error as error:
        raise DataError(f"{path} is no valid zstd file: {error}. Compress it anew with `zstd`.") from error


def decompressed(file: BinaryIO, new_decompressor: Callable[[], Decompressor]) -> Iterator[bytes]:
    """The parts of all frames of `file`; raises EOFError where the last is cut, which `zstandard.open` passes over."""
    decompressor = new_decompressor()
    while data := file.read(CHUNK):
        while data:
            if decompressor.eof:
                decompressor = new_decompressor()
            yield decompressor.decompress(data)
            data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise EOFError
