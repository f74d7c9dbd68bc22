"""Mistral's instruct format, built id by id: `<s>([INST] user[/INST] assistant</s>)+`.

Ground truth is Mistral's own package mistral-common (`InstructTokenizerV3`); the tests compare with it. Templates of
strings cannot do this: a control token written in a row would become one, and the template on the Hub drops the
system message of every training row.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Self

from attrs import frozen

from mlx_trainer.data.conversation import Conversation, Message
from mlx_trainer.data.tokenizer import ChatTokenizer, TextEncoder, Tokens

SYSTEM_SEPARATOR = "\n\n"


@frozen
class Piece:
    """A part of a row: a control token's id or a text, trained or not."""

    content: int | str
    trained: bool = False


def glue(rows: Sequence[Sequence[Piece]], encoder: TextEncoder) -> list[Tokens]:
    """Tokens of each row of pieces; all texts of all rows are encoded in one batch."""
    encoded = iter(encoder.encode([piece.content for row in rows for piece in row if isinstance(piece.content, str)]))
    return [glue_row(row, encoded) for row in rows]


def glue_row(row: Sequence[Piece], encoded: Iterator[Sequence[int]]) -> Tokens:
    """Tokens of one row, whose texts are the next of `encoded`."""
    parts = [next(encoded) if isinstance(piece.content, str) else [piece.content] for piece in row]
    trained = [[piece.trained] * len(part) for piece, part in zip(row, parts, strict=True)]
    return Tokens.of(list(chain(*parts)), list(chain(*trained)))


@frozen
class MistralFormat:
    """Ids of the four control tokens, and the blank that stands before each text."""

    bos: int
    eos: int
    begin: int
    end: int
    blank: str

    @classmethod
    def of(cls, tokenizer: ChatTokenizer, encoder: TextEncoder) -> Self | None:
        """The format as `tokenizer` writes it, None where its vocabulary or its chat template say another one.

        The template decides between `[INST] user` (v0.3) and `[INST]user` (v3 on tekken); without one it is v0.3's.
        """
        bos, eos, begin, end = (encoder.control_id(name) for name in ("<s>", "</s>", "[INST]", "[/INST]"))
        if bos is None or eos is None or begin is None or end is None:
            return None
        for blank in (" ", ""):
            if tokenizer.chat_template is None or rendered_probe(tokenizer) == f"<s>[INST]{blank}u[/INST]{blank}a</s>":
                return cls(bos, eos, begin, end, encoder.leading_blank() if blank else "")
        return None

    def encode(self, conversations: Sequence[Conversation], encoder: TextEncoder) -> list[Tokens]:
        """Tokens of each conversation; trained are the ids of every assistant text and the `</s>` that closes it."""
        return glue([self.pieces(conversation) for conversation in conversations], encoder)

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """The conversation as control tokens and texts; the system text goes before the last user text."""
        turns, system = conversation.turns, conversation.system
        pieces = [Piece(self.bos)]
        for user, assistant in turns:
            before = system + SYSTEM_SEPARATOR if system and user is turns[-1][0] else ""
            pieces += self.turn(before + user.content, assistant)
        return pieces

    def turn(self, question: str, assistant: Message) -> list[Piece]:
        """One turn; trailing blanks of the answer are dropped as mistral-common does."""
        trained = bool(assistant.weight)
        return [
            Piece(self.begin),
            Piece(self.blank + question if question else ""),
            Piece(self.end),
            Piece(self.blank + assistant.content.rstrip(" "), trained),
            Piece(self.eos, trained),
        ]


def rendered_probe(tokenizer: ChatTokenizer) -> object:
    """What the chat template makes of one short turn."""
    probe = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    return tokenizer.apply_chat_template(probe, tokenize=False)
