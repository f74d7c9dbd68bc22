"""Chat templates of other models: marks and prefix differences."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data.conversation import DataError, RowError
from mlx_trainer.data.encoding import SampleEncoder
from mlx_trainer.data.formats import parse_messages
from mlx_trainer.data.tokenizer import Tokens
from tests.data.tokenizers_for_tests import CHATML, CHATML_WITH_MARKS, chatml_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "and two plus two?"},
    {"role": "assistant", "content": "four, hello"},
]


def encode(tokenizer: PreTrainedTokenizerFast, *chats: list[dict[str, Any]]) -> list[Tokens | RowError]:
    """What our encoder makes of `chats`."""
    return SampleEncoder.of(tokenizer).encode([parse_messages({"messages": chat}) for chat in chats])


def trained_text(tokenizer: PreTrainedTokenizerFast, row: Tokens | RowError) -> str:
    """The trained part of a row."""
    assert isinstance(row, Tokens), row
    return str(tokenizer.decode(row.ids[row.trained]))


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_MARKS], ids=["prefixes", "marks"])
def test_every_answer_and_its_eos_is_trained(template: str) -> None:
    """Both ways train each answer and the EOS that closes it, and nothing else, on the template's own ids."""
    tokenizer = chatml_tokenizer(template)
    rows = encode(tokenizer, CHAT, CHAT[1:3])
    assert [trained_text(tokenizer, row) for row in rows] == [
        "world<|im_end|>four, hello<|im_end|>",
        "world<|im_end|>",
    ]
    for chat, row in zip((CHAT, CHAT[1:3]), rows, strict=True):
        assert isinstance(row, Tokens)
        assert row.ids.tolist() == tokenizer.apply_chat_template(chat, return_dict=False)


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_MARKS], ids=["prefixes", "marks"])
def test_weight_zero_is_not_trained(template: str) -> None:
    """An answer of weight 0 is left out, also where the template's marks cover it."""
    tokenizer = chatml_tokenizer(template)
    (row,) = encode(tokenizer, [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]])
    assert trained_text(tokenizer, row) == "four, hello<|im_end|>"


def test_template_that_rewrites_what_came_before() -> None:
    """Where earlier answers change once a later one follows, the row is bad and the message says why."""
    forgetful = CHATML.replace("m.content +", "(m.content if loop.last or m.role != 'assistant' else '') +")
    one_turn, two_turns = encode(chatml_tokenizer(forgetful), CHAT[1:3], CHAT)
    assert isinstance(one_turn, Tokens)
    assert "messages[2]: the chat template does not write" in str(two_turns)


def test_rows_that_cannot_be_rendered() -> None:
    """A template that raises, and a text that spells a control token, make bad rows; others are not harmed."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    spelled = [{"role": "user", "content": "<|im_start|>system"}, CHAT[2]]
    refused, control, good = encode(chatml_tokenizer(strict), CHAT, spelled, CHAT[1:3])
    assert str(refused) == "messages: the chat template refuses them: no system role"
    assert str(control) == "messages[0].content: holds '<|im_start|>', which would become a control token"
    assert isinstance(good, Tokens)


def test_marks_that_cover_nothing() -> None:
    """A row that a template's marks leave without a trained token is bad."""
    empty = CHATML_WITH_MARKS.replace("{{ m.content }}{% endgen", "{% endgen")
    (row,) = encode(chatml_tokenizer(empty), CHAT)
    assert str(row) == "messages: the template's {% generation %} marks cover no token of this row"


def test_no_template_at_all() -> None:
    """Conversations for a tokenizer that cannot write any are refused as a whole, with the ways out."""
    with pytest.raises(DataError, match="neither a chat template nor Mistral's control tokens"):
        encode(chatml_tokenizer(None), CHAT)


def test_mistral_vocabulary_with_another_template(caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer with Mistral's control tokens whose template writes ChatML follows its template, with a warning."""
    from tests.data.tokenizers_for_tests import byte_level_mistral

    tokenizer = byte_level_mistral(CHATML)
    (row,) = encode(tokenizer, CHAT[1:3])
    assert trained_text(tokenizer, row) == "world<|im_end|>\n"
    assert "its chat template writes another format" in caplog.text
