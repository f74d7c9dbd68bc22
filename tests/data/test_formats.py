"""Row formats and the errors of rows."""

from typing import Any

import pytest
from hypothesis import given

from mlx_trainer.data.conversation import Conversation, Message, PromptCompletion, RowError, Sample, Text
from mlx_trainer.data.formats import FORMATS, detect_format
from tests.strategies import conversations

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def parse(row: dict[str, Any]) -> Sample:
    """The sample of `row` in whichever format it has."""
    return FORMATS[detect_format(row)].parse(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, Conversation((Message("user", "2+2?", 0), Message("assistant", "4")))),
        ({"prompt": "2+2?", "completion": "4"}, PromptCompletion("2+2?", "4")),
        ({"text": "two and two", "id": 7}, Text("two and two")),
        ({"text": "ignored", "messages": [USER, ASSISTANT]}, parse({"messages": [USER, ASSISTANT]})),
    ],
)
def test_formats(row: dict[str, Any], expected: Sample) -> None:
    """Each format is told by its keys; other keys are ignored, and messages come first."""
    assert parse(row) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "2+2?"}, "unknown format: the keys are 'question'; a row needs one of: messages; prompt and"),
        ({"messages": "hi"}, "messages: expected a list, got text"),
        ({"messages": []}, "messages: no user and assistant message"),
        ({"messages": ["hi"]}, r"messages\[0\]: expected an object with role and content, got text"),
        (
            {"messages": [{"role": "human", "content": "x"}]},
            r"messages\[0\].role: 'human' is not one of system, user, a",
        ),
        ({"messages": [{"content": "x"}]}, r"messages\[0\].role: missing"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"messages\[1\].content: expected text, got null",
        ),
        ({"messages": [USER, USER, ASSISTANT]}, r"messages\[1\].role: 'user' where 'assistant' is due"),
        ({"messages": [ASSISTANT]}, r"messages\[0\].role: 'assistant' where 'user' is due"),
        ({"messages": [USER, ASSISTANT, {"role": "system", "content": "x"}]}, r"messages\[2\].role: 'system' where"),
        ({"messages": [USER, ASSISTANT, USER]}, r"messages\[2\].role: ends with 'user'; nothing to train after it"),
        ({"messages": [USER, {**ASSISTANT, "content": "  "}]}, r"messages\[1\].content: empty"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "messages: every assistant message has weight 0"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, r"messages\[1\].weight: 0.5 is neither 0 nor 1"),
        ({"messages": [USER, {**ASSISTANT, "weight": True}]}, r"messages\[1\].weight: True is neither 0 nor 1"),
        ({"messages": [{**USER, "weight": 1}, ASSISTANT]}, r"messages\[0\].weight: 1 on a user message"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, r"messages\[1\].tool_calls: calls of tools cannot"),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "tools: definitions of tools cannot be encoded"),
        ({"prompt": "2+2?", "completion": 4}, "completion: expected text, got a number"),
        ({"prompt": "2+2?", "completion": " "}, "completion: empty"),
        ({"text": ""}, "text: empty"),
        ({"text": "half \ud83d"}, "text: holds half of a surrogate pair"),
    ],
)
def test_row_errors(row: dict[str, Any], message: str) -> None:
    """A row that cannot be used is refused with the path inside the row and what would be right."""
    with pytest.raises(RowError, match=f"^{message}"):
        parse(row)


@given(conversations(weights=True))
def test_every_conversation_is_kept_whole(messages: list[dict[str, Any]]) -> None:
    """Roles, texts and weights of valid messages come through unchanged, split into system text and turns."""
    conversation = parse({"messages": messages})
    assert isinstance(conversation, Conversation)
    assert [(m.role, m.content) for m in conversation.messages] == [(m["role"], m["content"]) for m in messages]
    answers = [m for m in messages if m["role"] == "assistant"]
    assert [a.weight for _, a in conversation.turns] == [m["weight"] for m in answers]
    assert conversation.system == (messages[0]["content"] if messages[0]["role"] == "system" else None)
