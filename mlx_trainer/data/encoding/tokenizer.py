"""Text to ids in batches, with a copy of the tokenizer in which no text is ever read as a control token."""

import re
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mlx_trainer.data.encoding.words import WordTable, encoded
from mlx_trainer.data.samples.conversation import DataError

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]


class ChatTokenizer(Protocol):
    """What is used of a transformers tokenizer (any that has a `tokenizer.json`)."""

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokenizers library that does the work."""

    @property
    def bos_token_id(self) -> int | None:
        """Id before the first token, if any."""

    @property
    def eos_token_id(self) -> int | None:
        """Id after the last token, if any."""

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding, if any."""

    @property
    def chat_template(self) -> Any:
        """The Jinja template of conversations, if any."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Text or ids of a conversation, or of a list of them."""


@frozen(eq=False)
class Tokens:
    """Ids of a row (length,) and which of them are trained (length,); the first never is: nothing predicts it."""

    ids: IntArray
    trained: BoolArray

    @classmethod
    def of(cls, ids: Sequence[int] | IntArray, trained: Sequence[bool] | BoolArray) -> Self:
        """Tokens of plain lists of equal length."""
        mask = np.array(trained, dtype=np.bool_)
        mask[:1] = False
        return cls(np.array(ids, dtype=np.int32), mask)


class TextEncoder:
    """Encodes texts as text: `</s>` written in a row becomes the letters `<`, `/`, `s`, `>`, never the control token.

    Args:
        tokenizer: a transformers tokenizer; it is copied, its own settings stay as they are.
        control_tokens: read `</s>` as the control token after all, as texts made by a chat template need it.

    Raises DataError where the tokenizer is not one of the tokenizers library.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, control_tokens: bool = False) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(
                f"{type(tokenizer).__name__} has no `backend_tokenizer`. Rows are encoded by the tokenizers library: "
                "load the tokenizer with transformers from a folder that holds a tokenizer.json."
            )
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = not control_tokens
        self._words = WordTable.of(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self._controls = {token.content: id for id, token in added.items() if token.special}
        self._spelled = re.compile("|".join(map(re.escape, self._controls)) or "(?!)")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOS."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[IntArray, IntArray]:
        """Ids of all texts one behind the other (ids,), and how many each has (texts,); one batch, on all cores."""
        parts = self._words.encode(texts) if self._words else encoded(self._backend, texts)
        lengths = np.fromiter(map(len, parts), dtype=np.int32, count=len(parts)) // np.dtype(np.int32).itemsize
        return np.frombuffer(b"".join(parts), dtype=np.int32), lengths

    def encode_with_ends(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids of each text, and for each id the letter at which it ends; slower than `encode`."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, [end for _, end in encoding.offsets]) for encoding in encodings]

    @property
    def largest_id(self) -> int:
        """The largest id that a text can have."""
        return max(self._backend.get_vocab(with_added_tokens=True).values())

    def control_id(self, name: str) -> int | None:
        """Id of the control token `name`, None where the vocabulary has none or holds it as plain text."""
        return self._controls.get(name)

    def spelled_control(self, text: str) -> str | None:
        """The first control token whose name `text` spells out, None where there is none."""
        found = self._spelled.search(text)
        return found.group() if found else None

    def token(self, id: int) -> str | None:
        """The token whose id is `id`, None where there is none."""
        return self._backend.id_to_token(id)

    def leading_blank(self) -> str:
        """What to put before a text so that its first word is encoded with exactly one blank before it.

        SentencePiece adds that blank by itself. Its conversions either add one always (then nothing is put), or only
        where there is none (`Metaspace`); byte-level BPE adds none. For the latter two it is a blank.
        """
        alone, after_blank = (self._backend.encode(text, add_special_tokens=False).tokens for text in ("a", " a"))
        adds_always = alone != after_blank and alone[:1] != [] and alone[0].startswith(("▁", "Ġ"))
        return "" if adds_always else " "
