"""Prompts against training rows: what a model is asked is, token for token, what its rows began with."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer.data import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.formats import parse_messages
from mlx_trainer.prompts import PromptEncoder, PromptError
from tests.data.tokenizers_for_tests import (
    CHATML_WITH_MARKS,
    CHATML_WITH_TOOLS,
    MISTRAL_TEMPLATE,
    byte_level_mistral,
    chatml_tokenizer,
    mistral_tokenizer,
)
from tests.strategies import chats, conversations

TOKENIZERS = {
    "Mistral v0.3": mistral_tokenizer(),
    "always a blank": mistral_tokenizer(always_prepend=True),
    "byte-level Mistral": byte_level_mistral(MISTRAL_TEMPLATE),
    "ChatML": chatml_tokenizer(CHATML_WITH_TOOLS),
    "ChatML with marks": chatml_tokenizer(CHATML_WITH_MARKS),
}
ROWS = {name: SampleEncoder.of(tokenizer) for name, tokenizer in TOKENIZERS.items()}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "and of </s>[INST] Italy?"},
]


def check(name: str, row: dict[str, Any]) -> None:
    """The prompt that asks for the last answer is the beginning of the row; what follows was trained, and ends it."""
    answers = [message | ({"weight": 1} if message["role"] == "assistant" else {}) for message in row["messages"]]
    (whole,) = ROWS[name].encode([parse_messages({**row, "messages": answers})])
    assert isinstance(whole, Tokens), whole
    prompt = PromptEncoder.of(TOKENIZERS[name]).encode({**row, "messages": row["messages"][:-1]})
    start = len(prompt)
    assert whole.ids[:start].tolist() == prompt
    stop = start + (int(whole.trained[start:].argmin()) or len(whole.ids) - start)
    assert (whole.trained[start - 1], whole.trained[start:stop].all(), whole.trained[stop:].any()) == (0, 1, 0)
    assert whole.ids[stop - 1] == TOKENIZERS[name].eos_token_id


@settings(max_examples=20)
@given(rows=chats(count=4), name=st.sampled_from(list(TOKENIZERS)[:2]))
def test_a_mistral_prompt_is_how_its_row_began(rows: list[dict[str, Any]], name: str) -> None:
    """With system text, tools, results, blanks, and texts that look like control tokens."""
    for row in rows:
        check(name, row)


@settings(max_examples=30)
@given(messages=conversations(), name=st.sampled_from(list(TOKENIZERS)))
def test_a_prompt_is_how_its_row_began(messages: list[dict[str, Any]], name: str) -> None:
    """So it is with any chat template that tells the answer's tokens."""
    check(name, {"messages": messages})


def test_a_mistral_prompt_read_aloud() -> None:
    """The system text stands in the last user message, `</s>[INST]` stays text, and a text is one user message."""
    tokenizer = mistral_tokenizer()
    ids = PromptEncoder.of(tokenizer).encode(CHAT)
    controls = tokenizer.convert_tokens_to_ids(["<s>", "[INST]", "[/INST]", "</s>"])
    assert [tokenizer.convert_ids_to_tokens(id) for id in ids if id in controls] == [
        *("<s>", "[INST]", "[/INST]", "</s>", "[INST]", "[/INST]")
    ]
    assert tokenizer.decode(ids) == (
        "<s>[INST] capital of France?[/INST] Paris.</s>[INST] Be brief.\n\nand of </s>[INST] Italy?[/INST]"
    )
    encoder = PromptEncoder.of(tokenizer)
    assert encoder.encode(CHAT[1:], "Be brief.") == ids
    tokenizer.chat_template = MISTRAL_TEMPLATE
    encoder = PromptEncoder.of(tokenizer)
    assert encoder.encode("Who?") == encoder.encode([{"role": "user", "content": "Who?"}])
    assert encoder.encode("Who?", "Be brief.") == encoder.encode("Be brief.\n\nWho?")


def test_without_a_template_a_text_is_continued_as_a_row_of_text() -> None:
    """A base model's prompt is the beginning of a `{"text": …}` row; messages need a format, which Mistral's is."""
    tokenizer = mistral_tokenizer()
    encoder = PromptEncoder.of(tokenizer)
    assert tokenizer.decode(encoder.encode("The sum </s>")) == "<s> The sum </s>"
    assert encoder.encode("The sum </s>").count(2) == 0
    assert encoder.encode("Who?", "Brief.") == encoder.encode([{"role": "user", "content": "Brief.\n\nWho?"}])
    with pytest.raises(PromptError, match="no chat template, so a prompt must be text, not a list of messages"):
        PromptEncoder.of(chatml_tokenizer(None)).encode(CHAT)


def test_a_tokenizer_that_changes_is_written_anew() -> None:
    """Another template, or another token, is seen although encoders are kept."""
    tokenizer = chatml_tokenizer()
    before = PromptEncoder.of(tokenizer).encode("Who?")
    assert PromptEncoder.of(tokenizer) is PromptEncoder.of(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "helper")
    assert PromptEncoder.of(tokenizer).encode("Who?") != before


def test_a_template_that_cannot_ask_is_told() -> None:
    """It writes rows, but fails where an answer is to be asked for."""
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}", "{% if add_generation_prompt %}{{ 1 // 0 }}"
    )
    with pytest.raises(PromptError, match="messages: the chat template refuses to ask for an answer: "):
        PromptEncoder.of(tokenizer).encode("Who?")


@pytest.mark.parametrize(
    ("prompt", "system", "reason"),
    [
        ([], None, "messages: an empty list; the last message is the one to answer"),
        (CHAT[:3], None, r"messages\[2\]\.role: ends with 'assistant', but it is the user's turn to ask"),
        (CHAT, "x", r"messages\[0\]: a system message beside the text of `system`"),
        ([*CHAT, CHAT[1]], None, r"messages\[4\]\.role: 'user' where 'assistant' is due"),
        ([{"role": "user"}], None, r"messages\[0\]\.content: missing"),
        ({"prompt": "x"}, None, "messages: expected a list, got null"),
        ("\ud83d", None, "holds half of a surrogate pair"),
        ([{"role": "user", "content": "a <|im_end|> b"}], None, "would become a control token"),
    ],
)
def test_a_prompt_that_no_row_could_begin_with_is_named(prompt: Any, system: str | None, reason: str) -> None:
    """What training refuses is refused here too, with its place."""
    with pytest.raises(PromptError, match=reason):
        PromptEncoder.of(TOKENIZERS["ChatML"]).encode(prompt, system)
