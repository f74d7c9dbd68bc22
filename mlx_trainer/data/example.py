"""A row as people read it: its ids as text, trained parts told from the others."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from attrs import evolve, frozen

from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.monitoring import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BEGIN, END = "⟦", "⟧"
"""Around trained text where there is no colour."""


class Decoder(Protocol):
    """What is used of a tokenizer to show a row."""

    def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> Any:
        """Text of ids, control tokens included."""


@frozen
class Span:
    """Text of neighbouring tokens that are all trained, or all not; of a remark about the row, `trained` is None."""

    text: str
    trained: bool | None


@frozen
class Example:
    """A row as text; `spans` joined, without remarks, are exactly what its ids decode to, or its two ends."""

    source: str
    spans: tuple[Span, ...]

    def plain(self) -> str:
        """The text with trained parts between `⟦` and `⟧`."""
        texts = ((visible(span.text), span.trained) for span in self.spans)
        return "".join(f"{BEGIN}{text}{END}" if trained else text for text, trained in texts)

    def coloured(self) -> "Text":
        """The text with trained parts in green, and remarks dim."""
        from rich.text import Text

        styles = {True: "green", False: "", None: "dim"}
        return Text.assemble(*((visible(span.text), styles[span.trained]) for span in self.spans))

    def changed(self, change: Callable[[str], str]) -> Self:
        """The row with each of its texts changed."""
        return evolve(self, spans=tuple(evolve(span, text=change(span.text)) for span in self.spans))

    def shortened(self, most: int) -> Self:
        """The row as it is, or where it has more than `most` characters its two ends and how many were left out."""
        total = sum(len(span.text) for span in self.spans)
        if total <= most:
            return self
        head, tail = -(-most // 2), most // 2
        left_out = f"{total - most:,} character{'' if total - most == 1 else 's'}"
        remark = Span(f" [… {left_out} left out …] ", None)
        return evolve(self, spans=(*piece(self.spans, 0, head), remark, *piece(self.spans, total - tail, total)))


def piece(spans: tuple[Span, ...], begin: int, end: int) -> list[Span]:
    """What of `spans` lies between two characters of them all."""
    found = []
    for span in spans:
        if text := span.text[max(begin, 0) : max(end, 0)]:
            found.append(evolve(span, text=text))
        begin, end = begin - len(span.text), end - len(span.text)
    return found


def show_examples(examples: Sequence[Example], console: "Console") -> None:
    """Print rows on `console`: trained text in green, or between markers where colour is off."""
    plain = console.color_system is None or console.no_color
    for example in examples:
        print(
            f"\n{example.source}, trained {f'between {BEGIN} and {END}' if plain else 'in green'}:", file=console.file
        )
        if plain:
            print(example.plain(), file=console.file)
        else:
            console.print(example.coloured(), soft_wrap=True, highlight=False)


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
