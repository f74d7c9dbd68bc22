"""Signals: the step under way is finished and saved, then the process ends as whoever sent the signal expects."""

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO, cast

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(SystemExit):
    """A run that a signal stopped, and that was saved; a script which does not catch it exits with 128 + the number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number


@contextmanager
def stopping_on_signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP, of a closed terminal, into `request_stop`, and raise Interrupted at the end.

    A handler only sets a flag: an exception inside a trace or a save would harm what is to be saved. The second signal
    of a kind has its former effect, so a second Ctrl-C ends at once. Does nothing outside the main thread, where
    Python has no signals.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        name = signal.Signals(number)
        signal.signal(name, former[name])
        request_stop(f"{name.name} received")
        logger.warning("%s: finishing this step, then saving; once more to end at once", name.name)

    # What ignores a signal, as under nohup, goes on ignoring it.
    former = {n: handler for n in SIGNALS if (handler := signal.getsignal(n)) not in (signal.SIG_IGN, None)}
    for number in former:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    if received:
        raise Interrupted(received[0])


class _Output:
    """A stream whose other end may go away: what is written then goes nowhere, and nothing is raised."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of a file."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of a file."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            # What stands in the buffer, and what the interpreter flushes at its end, must not fail again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def closed_output_ignored() -> Iterator[None]:
    """Let stdout and stderr be closed inside, by a reader that left or a terminal that is gone, without an error."""
    former = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and cast(TextIO, _Output(stream)) for stream in former)
    try:
        yield
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        sys.stdout, sys.stderr = former
