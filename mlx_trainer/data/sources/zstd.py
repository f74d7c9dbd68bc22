"""The content of a file compressed with zstd, by Python's own module (3.14) or the zstandard package."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Protocol

from mlx_trainer.data.samples.conversation import DataError

CHUNK = 1 << 10
"""Bytes that are read at once: each of them can stand for 32,768, so that no file makes a part above 32 MB."""


class Decompressor(Protocol):
    """What both modules have for one frame; after its end, `unused_data` is what follows in the last input."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes:
        """The bytes that `data` adds."""
        ...


def zstd_parts(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of the open `file`, all its frames; raises DataError where `path` is damaged or nothing can read it.

    Raises EOFError where its last frame is cut.
    """
    new_decompressor, error_type = zstd_module(path)
    try:
        yield from decompressed(file, new_decompressor)
    except error_type as error:
        raise DataError(f"{path} is no valid zstd file: {error}. Compress it anew with `zstd`.") from error


def zstd_module(path: Path) -> tuple[Callable[[], Decompressor], type[Exception]]:
    """What makes a decompressor, and the error it raises; raises DataError where neither module is there."""
    try:
        module = import_module("compression.zstd")
        return module.ZstdDecompressor, module.ZstdError
    except ImportError:
        pass
    try:
        module = import_module("zstandard")
    except ImportError as error:
        raise DataError(
            f"{path} is compressed with zstd, which this Python cannot read. "
            "Install the zstandard package (pip install zstandard), use Python 3.14, or compress it with gzip."
        ) from error
    return lambda: module.ZstdDecompressor().decompressobj(), module.ZstdError


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
