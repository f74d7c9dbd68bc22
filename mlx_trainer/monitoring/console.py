"""The one console for people."""

import sys
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@cache
def stderr_console() -> "Console":
    """Return rich's console on stderr, the same for all, so that a log line does not break a running progress bar.

    rich reads NO_COLOR and TERM itself, once, at the first call.
    """
    from rich.console import Console

    return Console(stderr=True)


def stderr_is_terminal() -> bool:
    """Tell whether somebody may be watching: stderr is a terminal that can do more than print lines."""
    return sys.stderr.isatty() and not stderr_console().is_dumb_terminal
