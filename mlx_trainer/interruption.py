"""Signals: the step under way is finished and saved, then the process ends as whoever sent the signal expects."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A run that a signal stopped, and that was saved; a script which does not catch it exits with 128 + the number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number


@contextmanager
def stopping_on_signals(request_stop: Callable[[str], None]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `request_stop`, and raise Interrupted at the end of the block.

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
