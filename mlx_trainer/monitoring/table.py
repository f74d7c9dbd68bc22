"""A table as HTML."""

from collections.abc import Iterable, Sequence
from html import escape


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text, escaped; a head of empty texts is left out."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    heading = line(head, "th") if any(head) else ""
    return f'<div class="wide"><table>{heading}{"".join(line(row, "td") for row in rows)}</table></div>'
