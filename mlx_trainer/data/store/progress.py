"""How far the reading of a source is, for people."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_trainer.data.sources.find import Source
from mlx_trainer.monitoring import stderr_console
from mlx_trainer.monitoring.console import stderr_is_terminal

SAID_EVERY_S = 15.0

logger = logging.getLogger("mlx_trainer.data")


@contextmanager
def reading(source: Source) -> Iterator[Callable[[int], None]]:
    """Show how far `source` is read: call the result with what was read since. A bar in a terminal, else log lines."""
    whole = source.size_hint()
    if not stderr_is_terminal():
        yield said(source.name, whole)
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = TextColumn("encoding {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(source.name, total=whole)
        yield lambda amount: bar.advance(task, amount)


def said(name: str, whole: int | None) -> Callable[[int], None]:
    """What logs a line now and then."""
    read, last = 0, time.monotonic()

    def told(amount: int) -> None:
        nonlocal read, last
        read += amount
        if whole and time.monotonic() - last > SAID_EVERY_S:
            last = time.monotonic()
            logger.info("encoding %s: %.0f %%", name, 100 * read / whole)

    return told
