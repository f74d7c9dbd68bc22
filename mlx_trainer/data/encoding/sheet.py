"""Rows under construction: control tokens and texts in order, all texts encoded in one batch."""

from collections.abc import Sequence

import numpy as np
from attrs import Factory, define

from mlx_trainer.data.encoding.tokenizer import BoolArray, IntArray, TextEncoder, Tokens

TEXT = -1
"""Stands for a text among the ids of control tokens."""


@define
class Sheet:
    """Parts of rows, one behind the other; `tokens` makes the rows of them.

    `pieces` has the id of each control token and `TEXT` for each of `texts`; `trained` goes with it, and `ends` holds
    where each row ends in it.
    """

    texts: list[str] = Factory(list)
    pieces: list[int] = Factory(list)
    trained: list[bool] = Factory(list)
    ends: list[int] = Factory(list)

    def control(self, id: int, trained: bool = False) -> None:
        """Add a control token."""
        self.pieces.append(id)
        self.trained.append(trained)

    def text(self, text: str, trained: bool = False) -> None:
        """Add a text."""
        self.texts.append(text)
        self.pieces.append(TEXT)
        self.trained.append(trained)

    def end_row(self) -> None:
        """Close the row; what follows belongs to the next."""
        self.ends.append(len(self.pieces))

    def tokens(self, encoder: TextEncoder) -> list[Tokens]:
        """Tokens of each row; they are views of two arrays that hold the whole batch."""
        if not self.ends:
            return []
        text_ids, text_lengths = encoder.encode_flat(self.texts)
        pieces = np.array(self.pieces, dtype=np.int32)
        lengths = np.ones(len(pieces), dtype=np.int64)
        lengths[pieces == TEXT] = text_lengths
        stops = np.cumsum(lengths)
        ids = np.repeat(pieces, lengths)
        ids[ids == TEXT] = text_ids
        trained = np.repeat(np.array(self.trained, dtype=np.bool_), lengths)
        ends = stops[np.array(self.ends) - 1]
        trained[0], trained[ends[:-1]] = False, False
        return slices(ids, trained, ends.tolist())


def slices(ids: IntArray, trained: BoolArray, ends: Sequence[int]) -> list[Tokens]:
    """The parts of both arrays that end at `ends`."""
    starts = [0, *ends[:-1]]
    return [Tokens(ids[a:b], trained[a:b]) for a, b in zip(starts, ends, strict=True)]
