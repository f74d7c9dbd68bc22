"""Markdown of values and texts that were written elsewhere."""

import re
from collections.abc import Sequence
from typing import Any

from mlx_trainer.monitoring import mask_secrets, visible


def table(title: str, rows: Sequence[tuple[Any, ...]], head: Sequence[str] = ("", "")) -> str:
    """Return a Markdown table below its title, nothing where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *(map(cell, row) for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Return a value as a table shows it."""
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
    return inline(str(value))


def is_number(value: object) -> bool:
    """Whether a value is a number, and no yes or no."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def inline(text: str) -> str:
    r"""Return text from outside so that Markdown shows it as it is, on one line: no markup, HTML, link or new cell.

    Access tokens are masked first: escaped, they could not be told any more.

    >>> print(inline("<b>x|y</b>\n# z"))
    \<b\>x\|y\</b\> # z
    """
    return re.sub(r"([\\`*_\[\]<>|&~:@$!]|(?<=www)\.)", r"\\\1", " ".join(visible(mask_secrets(text)).split()))
