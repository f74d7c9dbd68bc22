"""A row as people read it: its ids as text, trained parts told from the others."""

import re
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from attrs import frozen

from mlx_trainer.data.store import TokenRow

if TYPE_CHECKING:
    from rich.text import Text

BEGIN, END = "⟦", "⟧"
"""Around trained text where there is no colour."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters with which a row could command the terminal, or hide from it; line ends and tabs are harmless."""


class Decoder(Protocol):
    """What is used of a tokenizer to show a row."""

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> Any:
        """Text of ids, control tokens included."""


@frozen
class Span:
    """Text of neighbouring tokens that are all trained, or all not."""

    text: str
    trained: bool

    @property
    def visible(self) -> str:
        r"""The text with its control characters as escapes, such as `\r`."""
        return CONTROLS.sub(lambda found: repr(found.group())[1:-1], self.text)


@frozen
class Example:
    """A row as text; `spans` joined are exactly what its ids decode to."""

    source: str
    spans: tuple[Span, ...]

    def plain(self) -> str:
        """The text with trained parts between `⟦` and `⟧`."""
        return "".join(f"{BEGIN}{span.visible}{END}" if span.trained else span.visible for span in self.spans)

    def coloured(self) -> "Text":
        """The text with trained parts in green."""
        from rich.text import Text

        return Text.assemble(*((span.visible, "green" if span.trained else "") for span in self.spans))


def render(row: TokenRow, tokenizer: Decoder) -> Example:
    """The row as text, cut where trained and other tokens meet.

    The ids are decoded in one piece and cut at the lengths of their decoded beginnings: a part that is decoded by
    itself would lose its first blank with SentencePiece.
    """

    def text(stop: int) -> str:
        return str(tokenizer.decode(row.ids[:stop].tolist(), clean_up_tokenization_spaces=False))

    edges = [0, *(np.flatnonzero(np.diff(row.trained)) + 1).tolist(), len(row)]
    beginnings = [text(edge) for edge in edges]
    whole, cuts = beginnings[-1], [len(beginning) for beginning in beginnings]
    ranges = zip(edges, cuts, cuts[1:], strict=False)
    return Example(row.source, tuple(Span(whole[a:b], bool(row.trained[edge])) for edge, a, b in ranges))
