"""Answers side by side in a terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from attrs import frozen
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mlx_trainer.chat.screen import Show
from mlx_trainer.monitoring import visible


@frozen
class Columns:
    """A column for each answer, under its name; what is longer than the screen is whole at the end of the turn."""

    names: Sequence[str]

    @contextmanager
    def turn(self) -> Iterator[Show]:
        """Draw the columns again at each piece."""
        texts = [""] * len(self.names)
        with Live(self._table(texts), console=Console(file=sys.stdout), auto_refresh=False) as live:

            def show(number: int, piece: str) -> None:
                texts[number] += visible(piece)
                live.update(self._table(texts), refresh=True)

            yield show

    def _table(self, texts: Sequence[str]) -> Table:
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for name in self.names:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*map(Text, texts))
        return table
