"""zstd, by Python's own module (3.14) or the zstandard package: the one choice for data and for checkpoints."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import attrs


class Decompressor(Protocol):
    """What both modules have for one frame; after its end, `unused_data` is what follows in the last input."""

    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, /) -> bytes:
        """The bytes that `data` adds."""
        ...


@attrs.frozen
class Zstd:
    """What both modules have, under one name each."""

    compress: Callable[[bytes, int], bytes]
    """`compress(data, level)`: one frame, at a level from 1 to 19."""
    new_decompressor: Callable[[], Decompressor]
    error: type[Exception]
    """What a decompressor raises for data that is damaged."""


def zstd() -> Zstd:
    """The module that is there. Raises ImportError, which says what to install, where neither is."""
    try:
        own = import_module("compression.zstd")
        return Zstd(lambda data, level: bytes(own.compress(data, level)), own.ZstdDecompressor, own.ZstdError)
    except ImportError:
        pass
    try:
        package = import_module("zstandard")
    except ImportError as error:
        raise ImportError("Install the zstandard package (pip install zstandard), or use Python 3.14") from error
    return Zstd(
        lambda data, level: bytes(package.ZstdCompressor(level=level).compress(data)),
        lambda: package.ZstdDecompressor().decompressobj(),
        package.ZstdError,
    )
