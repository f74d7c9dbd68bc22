"""Ids of words, looked up where they were encoded before: exact for SentencePiece's vocabularies.

Such a tokenizer sees a text as one word, in which every blank became `▁`. Where no token of its vocabulary has a `▁`
behind another letter, and none a line end, no merge reaches over the beginning of a word or a line, so a text's ids are
those of its words one behind the other. Most words of a text were seen before, and looking one up costs a tenth of
encoding it.
"""

import json
import re
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any, Self

from tokenizers import Tokenizer

BLANK = "▁"
WHOLE = "\n"
"""Before a text that is not cut into words: no word begins with a line end but the line end itself."""
LONGEST = 32
"""Letters of the longest word that is kept."""
MOST = 200_000
"""Words that are kept, about 30 MB."""

CROSSES = re.compile(f"[^{BLANK}]{BLANK}|\n")
WORDS = re.compile(r" *[^ \n]+| +|\n")


class WordTable:
    """The ids of words, with the blanks before them, as bytes of int32."""

    def __init__(self, backend: Tokenizer, *, prepends: bool) -> None:
        self._backend = backend
        self._prepends = prepends
        self._ids: dict[str, bytes] = {}
        (self._line_end,) = encoded(backend, ["\n"])
        self._blank = self._line_end[: array("i").itemsize]  # the tokenizer puts one before

    @classmethod
    def of(cls, backend: Tokenizer) -> Self | None:
        """The table for `backend`, None where its ids cannot be told word by word."""
        settings = json.loads(backend.to_str())
        model, added = settings["model"], settings["added_tokens"]
        plain = (
            model["type"] == "BPE"
            and model["byte_fallback"]
            and not any(model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix"))
            and not model.get("end_of_word_suffix")
            and all(token["special"] for token in added)
            and backend.encode_special_tokens
        )
        prepends = prepends_always(settings["normalizer"], settings["pre_tokenizer"])
        if not plain or prepends is None or any(map(CROSSES.search, model["vocab"])):
            return None
        return cls(backend, prepends=prepends)

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text, as bytes of int32."""
        words = [self._words(text) for text in texts]
        missing = set(chain.from_iterable(words)) - self._ids.keys()
        if 2 * len(missing) > sum(map(len, words)):  # next to nothing is said twice, as where no blanks are written
            return encoded(self._backend, texts)
        self._learn(list(missing))
        find = self._ids.__getitem__
        found = [b"".join(map(find, row)) for row in words]
        self._forget(missing)
        return found

    def _words(self, text: str) -> list[str]:
        if BLANK in text:  # a letter that looks like a blank to the vocabulary
            return [WHOLE + text]
        if text and (self._prepends or text[0] != " "):
            text = " " + text
        return WORDS.findall(text)

    def _learn(self, words: list[str]) -> None:
        """Encode `words` in one batch. One behind a line end has no blank, so it is encoded behind a line end."""
        ids = encoded(self._backend, [self._as_text(word) for word in words])
        for word, found in zip(words, ids, strict=True):
            self._ids[word] = found if word[0] == " " or is_whole(word) else found[len(self._line_end) :]
        if " " in self._ids:
            self._ids[" "] = self._blank

    def _as_text(self, word: str) -> str:
        if is_whole(word):
            return word[1:]
        if word[0] == " ":
            return word[1:] if self._prepends else word
        return "\n" + word

    def _forget(self, words: set[str]) -> None:
        """Drop those of `words` that are too long to come again, and all words where they are too many."""
        if len(self._ids) > MOST:
            self._ids.clear()
        for word in words:
            if len(word) > LONGEST:
                self._ids.pop(word, None)


def is_whole(word: str) -> bool:
    """Whether it is a text that was not cut."""
    return word[0] == WHOLE and word != WHOLE


def prepends_always(normalizer: Any, pre_tokenizer: Any) -> bool | None:
    """Whether a blank is put before every text, or only where there is none; None for any other way with blanks."""
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    if pre_tokenizer is None and normalizer is not None:
        steps = normalizer.get("normalizers")
        return True if steps == [{"type": "Prepend", "prepend": BLANK}, replaces] else None
    if normalizer is None and pre_tokenizer is not None and pre_tokenizer["type"] == "Metaspace":
        first = pre_tokenizer["prepend_scheme"] in ("first", "always")
        return False if first and not pre_tokenizer["split"] and pre_tokenizer["replacement"] == BLANK else None
    return None


def encoded(backend: Tokenizer, texts: Sequence[str]) -> list[bytes]:
    """The ids of each text, as bytes of int32; one batch, on all cores."""
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [array("i", encoding.ids).tobytes() for encoding in encodings]
