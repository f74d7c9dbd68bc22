"""Row formats and the errors of rows."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples import formats
from mlx_trainer.data.samples.conversation import (
    Conversation,
    DataError,
    Message,
    PromptCompletion,
    RowError,
    Sample,
    Text,
)
from mlx_trainer.data.samples.fields import JsonObject
from mlx_trainer.data.samples.formats import FORMATS, detect_format, register_format, text_at
from tests.data.tokenizers_for_tests import CHATML_WITH_TOOLS, chatml_tokenizer, mistral_tokenizer
from tests.strategies import chats, conversations

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
HUMAN = {"from": "human", "value": "2+2?"}
GPT = {"from": "gpt", "value": "4"}
ALPACA = {"instruction": "Add.", "input": "2 2", "output": "4"}
ONE_TURN = (Message("user", "2+2?", 0), Message("assistant", "4"))


def parse(row: dict[str, Any]) -> Sample:
    """The sample of `row` in whichever format it has."""
    return FORMATS[detect_format(row)].parse(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, Conversation(ONE_TURN)),
        ({"prompt": "2+2?", "completion": "4"}, PromptCompletion("2+2?", "4")),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Conversation(ONE_TURN)),
        (
            {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
            Conversation((ONE_TURN[0], Message("assistant", "4", 0), *ONE_TURN)),
        ),
        (
            {"prompt": [USER], "completion": [{**ASSISTANT, "weight": 0}, USER, ASSISTANT]},
            Conversation((ONE_TURN[0], Message("assistant", "4", 0), *ONE_TURN)),
        ),
        ({"text": "two and two", "id": 7}, Text("two and two")),
        ({"text": "ignored", "messages": [USER, ASSISTANT]}, Conversation(ONE_TURN)),
        ({"messages": [USER, ASSISTANT], "chosen": "a", "rejected": "b"}, Conversation(ONE_TURN)),
        ({"conversations": [HUMAN, GPT], "system": None, "id": "a_0"}, Conversation(ONE_TURN)),
        (
            {"conversations": [HUMAN, {**GPT, "weight": 0}, HUMAN, GPT], "system": "Be brief."},
            Conversation((Message("system", "Be brief.", 0), *ONE_TURN[:1], Message("assistant", "4", 0), *ONE_TURN)),
        ),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT], "system": ""},
            Conversation((Message("system", "Be brief.", 0), *ONE_TURN)),
        ),
        (
            {**ALPACA, "text": "Below is an instruction ..."},
            Conversation((Message("user", "Add.\n2 2", 0), Message("assistant", "4"))),
        ),
        ({"instruction": "2+2?", "input": None, "output": "4", "history": None}, Conversation(ONE_TURN)),
        (
            {"instruction": "Why?", "input": "", "output": "So.", "system": "Be brief.", "history": [["2+2?", "4"]]},
            Conversation(
                (Message("system", "Be brief.", 0), *ONE_TURN, Message("user", "Why?", 0), Message("assistant", "So."))
            ),
        ),
    ],
)
def test_formats(row: dict[str, Any], expected: Sample) -> None:
    """Each format is told by its keys; other keys are ignored, messages come first, and Alpaca before text."""
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
        ({"conversations": {}}, "conversations: expected a list, got an object"),
        ({"conversations": [USER]}, r"conversations\[0\].from: missing"),
        ({"conversations": [1]}, r"conversations\[0\]: expected an object with from and value, got a number"),
        (
            {"conversations": [HUMAN, {"from": "function_call", "value": "{}"}]},
            r"conversations\[1\].value\[0\].name: None is no function name, 1 to 64 letters",
        ),
        (
            {"conversations": [HUMAN, HUMAN, GPT]},
            r"conversations\[1\].from: 'human' where 'gpt' is due; an optional system message, then human and gpt in",
        ),
        ({"conversations": [HUMAN, GPT, HUMAN]}, r"conversations\[2\].from: ends with 'human'; nothing to train"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": ""}]}, r"conversations\[1\].value: empty; a message"),
        (
            {"conversations": [{**HUMAN, "weight": 1}, GPT]},
            r"conversations\[0\].weight: 1 on a human message, but only",
        ),
        ({"conversations": []}, "conversations: no human and gpt message"),
        ({"conversations": [HUMAN, {**GPT, "from": "bot"}]}, r"conversations\[1\].from: 'bot' is not one of system, h"),
        (
            {"conversations": [{"from": "system", "value": "x"}, HUMAN, GPT], "system": "y"},
            r"system: given beside the system message in conversations\[0\]; leave one of them out",
        ),
        ({**ALPACA, "output": " "}, "output: empty, so nothing would be trained"),
        ({**ALPACA, "input": 5}, "input: expected text, got a number"),
        ({**ALPACA, "system": []}, "system: expected text, got a list"),
        ({**ALPACA, "history": "x"}, r"history: expected a list of \[question, answer\] pairs, got text"),
        ({**ALPACA, "history": [["a", "b"], ["c"]]}, r"history\[1\]: expected a pair, \[question, answer\]"),
        ({**ALPACA, "history": [["a", None]]}, r"history\[0\]\[1\]: expected text, got null"),
        ({**ALPACA, "history": [["a", "b"], ["c", ""]]}, r"history\[1\]\[1\]: empty, so nothing would be trained"),
        ({"prompt": [USER], "completion": "4"}, "completion: expected a list, got text"),
        ({"prompt": "2+2?", "completion": [ASSISTANT]}, "prompt: expected a list, got text"),
        ({"prompt": [USER], "completion": []}, "completion: an empty list; the prompt ends with a question, the"),
        ({"prompt": [], "completion": [ASSISTANT]}, "prompt: an empty list"),
        ({"prompt": [USER], "completion": [USER, ASSISTANT]}, r"completion\[0\].role: 'user' where 'assistant' is due"),
        ({"prompt": [ASSISTANT], "completion": [ASSISTANT]}, r"prompt\[0\].role: 'assistant' where 'user' is due"),
        ({"prompt": [USER], "completion": [ASSISTANT, ASSISTANT]}, r"completion\[1\].role: 'assistant' where 'user'"),
        (
            {"prompt": [USER, {**ASSISTANT, "weight": 1}], "completion": [ASSISTANT]},
            r"prompt\[1\].weight: 1 in a prompt",
        ),
        (
            {"prompt": [USER], "completion": [{**ASSISTANT, "weight": 0}]},
            "completion: every assistant message has weight",
        ),
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
    """Roles, texts and weights of valid messages come through unchanged."""
    conversation = parse({"messages": messages})
    assert isinstance(conversation, Conversation)
    assert [(m.role, m.content) for m in conversation.messages] == [(m["role"], m["content"]) for m in messages]
    answers = [m for m in messages if m["role"] == "assistant"]
    assert [answer.weight for answer in conversation.answers] == [m["weight"] for m in answers]
    assert conversation.system == (messages[0]["content"] if messages[0]["role"] == "system" else None)


def written_as(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A row of messages, of which the answers of earlier turns have weight 0 or all have none, in every fitting format.

    What a format cannot hold is not written in it: Alpaca no tools, no weights and no system message without text, a
    pair of texts no second turn.
    """
    messages, tools = row["messages"], {"tools": row["tools"]} if "tools" in row else {}
    rows: dict[str, dict[str, Any]] = {"messages": row}
    rows["ShareGPT"] = {"conversations": [as_sharegpt(m) for m in messages]}
    if tools:
        rows["ShareGPT"]["tools"] = json.dumps(tools["tools"])
    weighted = any("weight" in m for m in messages)
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1))
    if not any(m.get("weight") == 0 for m in messages[first:]):
        prompt = [{key: m[key] for key in m if key != "weight"} for m in messages[:first]]
        rows["prompt/completion"] = {"prompt": prompt, "completion": messages[first:], **tools}
    system = [m["content"] for m in messages if m["role"] == "system"]
    if not tools and not weighted and system != [""]:
        texts = [m["content"] for m in messages if m["role"] != "system"]
        *history, (question, answer) = zip(texts[::2], texts[1::2], strict=True)
        rows["Alpaca"] = {"instruction": question, "output": answer, "history": list(map(list, history))}
        rows["Alpaca"] |= {"system": system[0]} if system else {}
        if not system and not history:
            rows["pair"] = {"prompt": question, "completion": answer}
    return rows


def as_sharegpt(message: dict[str, Any]) -> dict[str, Any]:
    """A message under ShareGPT's names, its calls as the JSON text of a list."""
    weight = {"weight": message["weight"]} if "weight" in message else {}
    if "tool_calls" in message:
        calls = [{**call["function"], **({"id": call["id"]} if "id" in call else {})} for call in message["tool_calls"]]
        return {"from": "function_call", "value": json.dumps(calls), **weight}
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    id = {"tool_call_id": message["tool_call_id"]} if "tool_call_id" in message else {}
    return {"from": names[message["role"]], "value": message["content"], **weight, **id}


def without_ids(row: dict[str, Any]) -> dict[str, Any]:
    """The row as data sets without ids of calls have it; results stand in the order of the calls."""
    messages = []
    for message in row["messages"]:
        calls = [{"function": call["function"]} for call in message.get("tool_calls", ())]
        kept = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        messages.append({**kept, "tool_calls": calls} if calls else kept)
    return {**row, "messages": messages}


@pytest.mark.parametrize("family", ["Mistral", "ChatML"])
def test_formats_agree_on_ids_and_masks(family: str) -> None:
    """The same conversation gives the same ids and mask in each of five formats, with tools in each that has them."""
    encoder = SampleEncoder.of(mistral_tokenizer() if family == "Mistral" else chatml_tokenizer(CHATML_WITH_TOOLS))
    compared: Counter[str] = Counter()

    @given(rows=chats(10), with_ids=st.booleans())
    @settings(max_examples=60, deadline=None, database=None)
    def compare(rows: list[dict[str, Any]], with_ids: bool) -> None:
        for row in rows:
            written = written_as(row if with_ids else without_ids(row))
            names = [name.replace("pair", "prompt/completion") for name in written]
            assert [detect_format(r) for r in written.values()] == names
            encoded = encoder.encode([parse(r) for r in written.values()])
            compared.update([*written, *(f"{name} with tools" for name in written if "tools" in row)])
            assert len({as_tuples(tokens) for tokens in encoded}) == 1, row

    compare()
    assert {name for name, count in compared.items() if count >= 5} == {
        *("messages", "ShareGPT", "prompt/completion", "Alpaca", "pair"),
        *("messages with tools", "ShareGPT with tools", "prompt/completion with tools"),
    }


def as_tuples(encoded: Tokens | RowError) -> tuple[Any, ...]:
    """Ids and mask, to compare."""
    assert isinstance(encoded, Tokens)
    return tuple(encoded.ids.tolist()), tuple(encoded.trained.tolist())


def test_a_format_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered function reads the rows that have its keys, before the formats that were there."""
    monkeypatch.setattr(formats, "FORMATS", dict(FORMATS))

    @register_format("rated", "text", "rating")
    def parse_rated(row: JsonObject) -> Text:
        return Text(f"{text_at(row, 'text')} ({row['rating']} of 5)")

    assert list(formats.FORMATS) == ["rated", *FORMATS]
    assert detect_format({"text": "fine", "rating": 4}) == "rated"
    assert formats.FORMATS["rated"].parse({"text": "fine", "rating": 4}) == Text("fine (4 of 5)")
    assert parse_rated({"text": "", "rating": 1}) == Text(" (1 of 5)")
    assert detect_format({"text": "fine"}) == "text"


def test_formats_that_cannot_be_registered() -> None:
    """A name that is taken and a format without keys are refused."""
    with pytest.raises(DataError, match="The format 'text' exists already"):
        register_format("text", "body")
    with pytest.raises(DataError, match="The format 'mine' has no key to tell its rows by"):
        register_format("mine")
