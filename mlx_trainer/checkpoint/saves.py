"""The checkpoints of a run on their way to the disk, written by a thread while the training goes on."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import mlx.core as mx

logger = logging.getLogger(__name__)

Save = Callable[[], Path]
"""Writes a checkpoint and returns where it is."""


class Saves:
    """The checkpoints of a run on their way to the disk; `tell` hears of each that is complete.

    A save in the background reads arrays that may still be under way when it is added. They are handed to the thread
    only once they are there: that an array is there is noted in the array itself, without a lock (mlx 0.32,
    `array::wait`), so two threads must not wait for the same one: where the thread waited itself, two of three runs of
    3,000 saves ended in a segmentation fault. From then on nobody changes an array, and MLX's own functions may read
    it, and save it, in the thread. It is held until the save is done, so that no later step overwrites or frees it.
    """

    def __init__(self, tell: Callable[[Path], Any]) -> None:
        self._tell = tell
        self._added: list[tuple[Any, Save]] = []
        self._under_way: list[tuple[Any, Future[Path]]] = []
        self._stall_us: float | None = None

    def begin(self, ask: Callable[[], Iterable[Path | None]]) -> None:
        """Let `ask` save, or add what saves in the background, as soon as nothing else is under way."""
        start = time.perf_counter()
        self.follow(wait=True)
        for path in ask():
            if path is not None:
                self._tell(path)
        self._stall_us = 1e6 * (time.perf_counter() - start)
        logger.debug("a checkpoint held the training up for %.0f µs", self._stall_us)

    def add(self, arrays: Any, save: Save) -> None:
        """The thread will call `save` after the next `follow`; `arrays` are all of MLX's that it reads."""
        mx.async_eval(arrays)  # those that no step has dispatched
        self._added.append((arrays, save))

    def follow(self, wait: bool = False) -> None:
        """Tell of what is complete by now, with `wait` of all; raises CheckpointError for what could not be written.

        Waits for the arrays of a new save, so it is called where the step that makes them is over anyway.
        """
        while self._added:
            arrays, save = self._added.pop(0)
            mx.eval(arrays)
            self._under_way.append((arrays, in_writer_thread(save)))
        while self._under_way and (wait or self._under_way[0][1].done()):
            self._tell(self._under_way.pop(0)[1].result())

    @contextmanager
    def all_followed(self) -> Iterator[None]:
        """Leave the block once all is written, also where it fails; then a save that fails too hides no error.

        A second Ctrl-C, which means at once, waits for nothing.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            try:
                self.follow(wait=True)
            except Exception:
                logger.exception("a checkpoint could not be finished")
            raise
        self.follow(wait=True)

    def stall(self) -> dict[str, float]:
        """How long the newest checkpoint held the loop up, in µs, by its TensorBoard tag; once, then nothing.

        What is written in the loop waits for the step first, which counts.
        """
        stall_us, self._stall_us = self._stall_us, None
        return {} if stall_us is None else {"perf/checkpoint_stall_us": stall_us}


def in_writer_thread(save: Save) -> "Future[Path]":
    """Call `save` in the thread that writes, after what it was given before."""
    future: Future[Path] = Future()
    _writer().put((future, save))
    return future


@cache
def _writer() -> "SimpleQueue[tuple[Future[Path], Save]]":
    """The queue of the one thread that writes.

    One for the whole process: a thread that uses MLX starts a stream, and with it a thread of MLX's that never ends.
    A daemon: an interpreter that ends at once must not wait for the disk; what is half written is no checkpoint.
    """
    queue: SimpleQueue[tuple[Future[Path], Save]] = SimpleQueue()

    def work() -> None:
        while True:
            _run(*queue.get())

    threading.Thread(target=work, name="checkpoint-writer", daemon=True).start()
    return queue


def _run(future: "Future[Path]", save: Save) -> None:
    try:
        future.set_result(save())
    except BaseException as error:
        future.set_exception(error)
