"""Ids looked up word by word are those of the whole text."""

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from mlx_trainer.data.encoding import words
from mlx_trainer.data.encoding.words import WordTable, encoded
from tests.data.tokenizers_for_tests import byte_level_mistral, sentencepiece_backend
from tests.strategies import FRAGMENTS

BLANKS = st.sampled_from(["", " ", " ", "  ", "     ", "\n", "\t ", "▁", " ▁", "▁ "])
TEXTS = st.lists(st.tuples(BLANKS, FRAGMENTS | st.sampled_from(["the", "a", "of"])).map("".join), max_size=12).map(
    "".join
)


@cache
def backend(always_prepend: bool) -> Tokenizer:
    """Mistral v3's vocabulary, control tokens being text."""
    tokenizer = Tokenizer.from_str(sentencepiece_backend(always_prepend))
    tokenizer.encode_special_tokens = True
    return tokenizer


@cache
def table(always_prepend: bool) -> WordTable:
    """A table that keeps what it learnt from example to example."""
    found = WordTable.of(backend(always_prepend))
    assert found is not None
    return found


@pytest.mark.parametrize("always_prepend", [False, True])
@given(texts=st.lists(TEXTS, max_size=6))
@settings(max_examples=300, deadline=None)
def test_equals_encoding_the_whole_text(always_prepend: bool, texts: list[str]) -> None:
    """Whatever blanks stand before, between and behind words, and whatever was looked up before."""
    texts = [*texts, *texts]  # so that not every word is new
    assert table(always_prepend).encode(texts) == encoded(backend(always_prepend), texts)


@pytest.mark.parametrize("always_prepend", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  ",
        "a",
        " a",
        "  a",
        "a ",
        "a  ",
        "▁",
        " ▁",
        "▁a b",
        "a▁ b",
        "\n",
        "\n\n",
        "a\n b",
        "\0",
        "\n\0",
        "\n▁",
    ],
)
def test_equals_at_the_edges(always_prepend: bool, text: str) -> None:
    """Nothing, blanks alone, and letters that look like blanks."""
    found = WordTable.of(backend(always_prepend))
    assert found is not None
    assert found.encode([text] * 3) == encoded(backend(always_prepend), [text] * 3)


def test_words_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second text of the same words asks the tokenizer for nothing."""
    asked: list[str] = []

    def counted(backend: Tokenizer, texts: Any) -> list[bytes]:
        asked.extend(texts)
        return encoded(backend, texts)

    found = WordTable.of(backend(False))
    assert found is not None
    monkeypatch.setattr(words, "encoded", counted)
    found.encode(["a rose is a rose is a rose"])
    assert sorted(asked) == [" a", " is", " rose"]
    found.encode(["is a rose a rose"])
    assert len(asked) == 3


def test_few_words_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long words are not kept, all are dropped where they are too many, and ids stay right."""
    monkeypatch.setattr(words, "MOST", 5)
    found = WordTable.of(backend(False))
    assert found is not None
    for number in range(20):
        texts = [f"a{number} b c {'long' * 20} a{number} b c b c b"] * 3
        assert found.encode(texts) == encoded(backend(False), texts)
        assert len(found._ids) <= 8
        assert all(len(word) <= words.LONGEST for word in found._ids)


def test_texts_without_blanks_are_encoded_whole() -> None:
    """Where nearly every word is new, as in Chinese, nothing is looked up or kept."""
    found = WordTable.of(backend(False))
    assert found is not None
    texts = ["日本語のテキスト", "別のテキスト"]
    assert found.encode(texts) == encoded(backend(False), texts)
    assert found._ids == {}


def changed(**changes: Any) -> Tokenizer:
    """Mistral's tokenizer with other settings of its model."""
    settings = json.loads(sentencepiece_backend())
    settings["model"].update(changes)
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_others_are_encoded_whole() -> None:
    """No table for byte-level BPE, added words, a token across a blank, or models that merge otherwise."""
    assert WordTable.of(byte_level_mistral().backend_tokenizer) is None
    with_word = changed()
    with_word.add_tokens([AddedToken("foo bar", special=False)])
    assert WordTable.of(with_word) is None
    vocabulary = json.loads(sentencepiece_backend())["model"]["vocab"]
    for token in ("of▁the", "of\n"):
        assert WordTable.of(changed(vocab=vocabulary | {token: len(vocabulary)})) is None
    assert WordTable.of(changed(dropout=0.1)) is None
    assert WordTable.of(changed(ignore_merges=True)) is None
    reads_controls = changed()
    reads_controls.encode_special_tokens = False
    assert WordTable.of(reads_controls) is None
    assert WordTable.of(changed()) is not None
