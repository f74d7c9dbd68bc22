"""Lines of a file compressed with zstd, by Python's own module (3.14) or the zstandard package."""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol

from mlx_trainer.data.conversation import DataError

CHUNK = 1 << 20
"""Bytes that are read at once."""


class Decompressor(Protocol):
    """What both modules have for one frame; after its end, `unused_data` is what follows in the last input."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes:
        """The bytes that `data` adds."""
        ...


def zstd_lines(path: Path) -> Iterator[bytes]:
    """The lines of `path` without their ends; raises DataError where it is damaged or no module can read it.

    Raises EOFError where its last frame is cut.
    """
    new_decompressor, error_type = zstd_module(path)
    try:
        yield from split_lines(decompressed(path, new_decompressor))
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


def decompressed(path: Path, new_decompressor: Callable[[], Decompressor]) -> Iterator[bytes]:
    """The parts of all frames of `path`; raises EOFError where the last is cut, which `zstandard.open` passes over."""
    decompressor = new_decompressor()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            while data:
                if decompressor.eof:
                    decompressor = new_decompressor()
                yield decompressor.decompress(data)
                data = decompressor.unused_data if decompressor.eof else b""
    if not decompressor.eof:
        raise EOFError


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of `parts`, which may end anywhere, without their ends."""
    rest = b""
    for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        yield from whole
    yield rest
