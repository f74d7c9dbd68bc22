"""Answers as lines, one after the other."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from attrs import frozen

from mlx_trainer.monitoring import visible

Show = Callable[[int, str], None]
"""Show the next piece of the answer with this number."""


class Screen(Protocol):
    """Where the answers of a turn appear."""

    def turn(self) -> AbstractContextManager[Show]:
        """What shows the pieces of one turn."""


def show_stream(pieces: Iterable[str]) -> None:
    """Write one answer to a terminal as it comes."""
    with Lines([""], terminal=True).turn() as show:
        for piece in pieces:
            show(0, piece)


@frozen
class Lines:
    """Each answer begins a line, after its name where there are several; in a terminal control characters are shown."""

    names: Sequence[str]
    terminal: bool

    @contextmanager
    def turn(self) -> Iterator[Show]:
        """Write and flush each piece as it comes, and end the line."""
        begun: list[int] = []

        def show(number: int, piece: str) -> None:
            if number not in begun:
                begun.append(number)
                name = self.names[number]
                sys.stdout.write(("\n" if len(begun) > 1 else "") + (f"{name}: " if name else ""))
            sys.stdout.write(visible(piece) if self.terminal else piece)
            sys.stdout.flush()

        try:
            yield show
        finally:
            print(flush=True)
