"""Event files, as TensorBoard reads them."""

import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_trainer.monitoring.files import explained, make_folder

if TYPE_CHECKING:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

PREFIX = "events.out.tfevents."


def load_tensorboardx() -> None:
    """Import tensorboardX, but not PyTorch, which it would load for 0.8 s to name a type; it still can later."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # what is None there cannot be imported
    try:
        import tensorboardX  # noqa: F401
    finally:
        if hidden:
            del sys.modules["torch"]


class EventFile:
    """A new event file in `folder`; what is written is with the operating system at once, so that a kill loses nothing.

    tensorboardX's own writer keeps events in a queue and a buffer for seconds: a killed run would have a gap before its
    last checkpoint. With `purge_step`, TensorBoard hides what earlier files have at this step and later.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        load_tensorboardx()
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.path = next_path(make_folder(folder))
        with explained("write", self.path):
            self._file = self.path.open("xb", buffering=0)
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=purge_step, session_log=start))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values by their tags; about 20 µs each."""
        from tensorboardX.summary import scalar

        self._add(step, *(scalar(tag, value) for tag, value in values.items()))

    def add_text(self, step: int, tag: str, text: str) -> None:
        """Write a text, read as Markdown by TensorBoard."""
        from tensorboardX import summary

        self._add(step, summary.text(tag, text))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def _add(self, step: int, *summaries: "Summary") -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._append(*(Event(wall_time=time.time(), step=step, summary=summary) for summary in summaries))

    def _append(self, *events: "Event") -> None:
        with explained("write", self.path):
            self._file.write(b"".join(record(event.SerializeToString()) for event in events))


def next_path(folder: Path) -> Path:
    """A file name behind all others in `folder`, as TensorBoard reads them by name; even if the clock was put back."""
    parts = [path.name.removeprefix(PREFIX).split(".")[0] for path in folder.glob(f"{PREFIX}*")]
    newest = max((int(part) for part in parts if part.isdecimal()), default=0)
    return folder / f"{PREFIX}{max(int(time.time()), newest + 1)}.{socket.gethostname()}"


def record(data: bytes) -> bytes:
    """`data` with its length and the checksums of both, as TFRecord files have it."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checks[0] + data + checks[1]
