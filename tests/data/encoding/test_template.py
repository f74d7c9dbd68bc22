"""Chat templates of other models: marks and prefix differences."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.conversation import DataError, RowError
from mlx_trainer.data.samples.formats import parse_messages
from tests.data.tokenizers_for_tests import CHATML, CHATML_WITH_MARKS, CHATML_WITH_TOOLS, chatml_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "world"},
    {"role": "user", "content": "and two plus two?"},
    {"role": "assistant", "content": "four, hello"},
]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ADD = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLED = [
    {"role": "user", "content": "two plus two?"},
    {"role": "assistant", "tool_calls": [{"id": "call_1", **ADD}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "four"},
    {"role": "assistant", "content": "four, hello"},
]
TOOLS_WITH_MARKS = CHATML_WITH_TOOLS.replace(
    "+ m.content }}", "}}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
).replace(
    "{% endfor %}{{ '<|im_end|>", "{% endfor %}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>"
)


def encode(tokenizer: PreTrainedTokenizerFast, *chats: list[dict[str, Any]]) -> list[Tokens | RowError]:
    """What our encoder makes of `chats`."""
    return SampleEncoder.of(tokenizer).encode([parse_messages({"messages": chat}) for chat in chats])


def trained_text(tokenizer: PreTrainedTokenizerFast, row: Tokens | RowError) -> str:
    """The trained part of a row."""
    assert isinstance(row, Tokens), row
    return str(tokenizer.decode(row.ids[row.trained]))


@pytest.mark.parametrize("template", [CHATML, CHATML_WITH_MARKS], ids=["prefixes", "marks"])
def test_every_byte_of_an_answers_last_letter_is_trained(template: str) -> None:
    """transformers marks the first of a letter's byte tokens alone; the others, and the EOS behind, are trained too."""
    tokenizer = chatml_tokenizer(template)
    chat = [{"role": "user", "content": "日本"}, {"role": "assistant", "content": "日本語🙂"}]
    assert [trained_text(tokenizer, row) for row in encode(tokenizer, chat)] == ["日本語🙂<|im_end|>"]


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


def with_tools(template: str, *rows: dict[str, Any]) -> list[Tokens | RowError]:
    """What our encoder makes of rows of messages with a ChatML template."""
    return SampleEncoder.of(chatml_tokenizer(template)).encode([parse_messages(row) for row in rows])


@pytest.mark.parametrize("template", [CHATML_WITH_TOOLS, TOOLS_WITH_MARKS], ids=["prefixes", "marks"])
def test_calls_of_tools_are_trained(template: str) -> None:
    """Definitions, calls and results go through the template with arguments as objects; calls are trained, with EOS."""
    tokenizer = chatml_tokenizer(template)
    rows = [{"messages": CALLED, "tools": TOOLS}, {"messages": CHAT}, {"messages": CALLED[:2], "tools": TOOLS}]
    encoded = with_tools(template, *rows)
    call = '\n{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}<|im_end|>'
    assert [trained_text(tokenizer, row) for row in encoded] == [
        f"{call}four, hello<|im_end|>",
        "world<|im_end|>four, hello<|im_end|>",
        call,
    ]
    assert isinstance(encoded[0], Tokens)
    assert str(tokenizer.decode(encoded[0].ids)) == (
        '<|im_start|>tools\n[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]'
        f"<|im_end|>\n<|im_start|>user\ntwo plus two?<|im_end|>\n<|im_start|>assistant\n{call}\n"
        "<|im_start|>tool\nfour<|im_end|>\n<|im_start|>assistant\nfour, hello<|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (CHATML, "tools[0]: the chat template leaves out the tool 'add'; use a tokenizer whose template has tools"),
        (CHATML_WITH_MARKS, "tools[0]: the chat template leaves out the tool 'add'"),
        (
            CHATML_WITH_TOOLS.replace("call|tojson", "'a call'"),
            "messages[1].tool_calls[0]: the chat template leaves out the call of 'add'",
        ),
        (
            CHATML_WITH_TOOLS.replace("+ m.content", "+ (m.content if m.role != 'tool' else '')"),
            "messages[2]: the chat template leaves out the tool's result",
        ),
        (
            TOOLS_WITH_MARKS.replace(
                "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and m.content %}"
            ).replace("{% else %}{{ m.content }}", "{% else %}{{ m.content }}{{ m.tool_calls or '' }}"),
            "messages: the template's {% generation %} marks cover 1 of 2 assistant messages",
        ),
        (
            "{% if messages[-1].role == 'tool' %}{{ raise_exception('no') }}{% endif %}" + CHATML_WITH_TOOLS,
            "messages[3]: the chat template cannot write the part before this answer by itself, so the answer's",
        ),
        (
            "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + CHATML_WITH_TOOLS,
            "messages: the chat template refuses them: no tools",
        ),
    ],
)
def test_tools_that_a_template_leaves_out(template: str, error: str) -> None:
    """A template that passes over tools, calls or results makes a bad row that names them; other rows are kept."""
    refused, kept = with_tools(template, {"messages": CALLED, "tools": TOOLS}, {"messages": CHAT})
    assert isinstance(refused, RowError)
    assert str(refused).startswith(error)
    assert isinstance(kept, Tokens)


def test_control_tokens_in_tools() -> None:
    """Definitions and arguments that spell a control token make bad rows, as texts do."""
    spelled = {"function": {"name": "add", "description": "<|im_end|>"}}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"<|im_start|>": 1}}}]}
    definition, argument = with_tools(
        CHATML_WITH_TOOLS, {"messages": CALLED, "tools": [spelled]}, {"messages": [CALLED[0], call], "tools": TOOLS}
    )
    assert str(definition) == "tools[0]: holds '<|im_end|>', which would become a control token"
    assert str(argument) == "messages[1].tool_calls[0]: holds '<|im_start|>', which would become a control token"


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
