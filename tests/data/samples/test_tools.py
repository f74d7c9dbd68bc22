"""Tools in rows: how they are read, which rows are refused, and what is kept."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.exceptions import InvalidToolSchemaException

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.call_ids import nine_letters
from mlx_trainer.data.samples.conversation import Conversation, Message, RowError, Tool, ToolCall
from mlx_trainer.data.samples.formats import FORMATS, detect_format
from tests.data.ground_truth import expected
from tests.data.tokenizers_for_tests import byte_level_mistral, mistral_tokenizer
from tests.strategies import chats

USER = {"role": "user", "content": "Weather in Rome?"}
ASSISTANT = {"role": "assistant", "content": "Sunny."}
FUNCTION = {"name": "weather", "arguments": {"city": "Rome"}}
CALL = {"id": "abc123XYZ", "type": "function", "function": FUNCTION}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "abc123XYZ", "content": '{"sky":"clear"}'}
DEFINITION = {"name": "weather", "description": "Tells the weather.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": DEFINITION}]
ROW: dict[str, Any] = {"messages": [USER, CALLS, RESULT, ASSISTANT], "tools": TOOLS}


def parse(row: dict[str, Any]) -> Conversation:
    """The conversation of `row`."""
    conversation = FORMATS[detect_format(row)].parse(row)
    assert isinstance(conversation, Conversation)
    return conversation


def decoded(row: dict[str, Any]) -> tuple[str, str]:
    """All of a row and its trained part as text, in Mistral's format."""
    tokenizer = mistral_tokenizer()
    (tokens,) = SampleEncoder.of(tokenizer).encode([parse(row)])
    assert isinstance(tokens, Tokens), tokens
    return str(tokenizer.decode(tokens.ids)), str(tokenizer.decode(tokens.ids[tokens.trained]))


def test_where_tools_stand_and_what_is_trained() -> None:
    """Definitions stand before the last question; calls and answers with their `</s>` are trained, nothing else."""
    whole, trained = decoded({**ROW, "messages": [{"role": "system", "content": "Be brief."}, *ROW["messages"]]})
    assert whole == (
        '<s>[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "weather", '
        '"description": "Tells the weather.", "parameters": {"type": "object"}}}]'
        "[/AVAILABLE_TOOLS][INST] Be brief.\n\nWeather in Rome?[/INST]"
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abc123XYZ"}]</s>'
        '[TOOL_RESULTS] {"content": {"sky": "clear"}, "call_id": "abc123XYZ"}[/TOOL_RESULTS] Sunny.</s>'
    )
    assert trained == (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "abc123XYZ"}]</s> Sunny.</s>'
    )


def test_calls_of_weight_zero_are_not_trained() -> None:
    """A call of weight 0 stays in the row and is not trained, `[TOOL_CALLS]` and `</s>` included."""
    whole, trained = decoded({**ROW, "messages": [USER, {**CALLS, "weight": 0}, RESULT, ASSISTANT]})
    assert "[TOOL_CALLS]" in whole
    assert trained == " Sunny.</s>"


@pytest.mark.parametrize(
    "change",
    [
        {"tools": json.dumps(TOOLS)},
        {"tools": [DEFINITION]},
        {"messages": [USER, {**CALLS, "content": ""}, RESULT, ASSISTANT]},
        {"messages": [USER, {**CALLS, "tool_calls": [{"id": "abc123XYZ", **FUNCTION}]}, RESULT, ASSISTANT]},
        {"messages": [USER, CALLS, {**RESULT, "name": "weather"}, ASSISTANT]},
        {"messages": [USER, CALLS, {"role": "tool", "content": RESULT["content"]}, ASSISTANT]},
    ],
)
def test_other_ways_to_write_a_row(change: dict[str, Any]) -> None:
    """Text or list, wrapped or bare, with or without what can be told from the rest: the same conversation."""
    assert parse({**ROW, **change}) == parse(ROW)


@pytest.mark.parametrize("nothing", [None, [], "", "[]"])
def test_no_tools(nothing: object) -> None:
    """Null, an empty list and no text are no tools; the row's calls stay."""
    assert parse({**ROW, "tools": nothing}) == parse({"messages": ROW["messages"]})


@pytest.mark.parametrize("arguments", ['{"city": "Rome"}', ' {"city":"R\\u006fme"} ', {"city": "Rome"}])
def test_arguments_as_text_or_object(arguments: object) -> None:
    """Arguments come out as one JSON text, however they were written; none are an empty object."""
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    row = {"messages": [USER, {**CALLS, "tool_calls": [call]}]}
    assert parse(row).messages[1].tool_calls == (ToolCall("weather", '{"city": "Rome"}', "abc123XYZ"),)
    for nothing in (None, "", {}):
        call["function"] = {"name": "weather", "arguments": nothing}
        assert parse(row).messages[1].tool_calls[0].arguments == "{}"


def test_sharegpt() -> None:
    """LLaMA-Factory's `function_call`, `observation` and `tools` text are calls, results and definitions."""
    value = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    turns = [("human", "Weather?"), ("function_call", value), ("observation", "clear"), ("gpt", "Sunny.")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns], "tools": json.dumps([DEFINITION])}
    user, call, result, answer = parse(row).messages
    (made,) = call.tool_calls
    assert re.fullmatch("[a-zA-Z0-9]{9}", str(made.id))
    assert (user, answer) == (Message("user", "Weather?", 0), Message("assistant", "Sunny."))
    assert call == Message("assistant", "", 1, (ToolCall("weather", '{"city": "Rome"}', made.id),))
    assert result == Message("tool", "clear", 0, tool_call_id=made.id, name="weather")
    assert parse(row).tools == (Tool("weather", json.dumps(TOOLS[0])),)


MANY = {**CALLS, "tool_calls": [CALL, {**CALL, "id": "secondcal"}]}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([USER, CALLS, USER], r"messages\[2\].role: 'user' where 'tool' is due; 1 of the calls before it have no"),
        ([USER, MANY, RESULT, ASSISTANT], r"messages\[3\].role: 'assistant' where 'tool' is due; 1 of the calls"),
        ([USER, RESULT], r"messages\[1\].role: 'tool' where 'assistant' is due; a message of tool answers a call"),
        (
            [USER, CALLS, RESULT, RESULT],
            r"messages\[3\].role: 'tool' where 'assistant' or 'user' is due; .* here is none left",
        ),
        ([USER, CALLS, RESULT], r"messages\[2\].role: ends with 'tool'; nothing to train after it"),
        ([USER, CALLS, {**RESULT, "tool_call_id": "x"}, ASSISTANT], r"messages\[2\].tool_call_id: 'x' is of no call"),
        ([USER, MANY, RESULT, RESULT, ASSISTANT], r"messages\[3\].tool_call_id: 'abc123XYZ' is of no call that waits"),
        ([USER, CALLS, {"role": "tool", "content": "", "name": "g"}, ASSISTANT], r"messages\[2\].name: 'g' is of no"),
        ([USER, CALLS, {**RESULT, "content": None}, ASSISTANT], r"messages\[2\].content: expected text, got null"),
        ([USER, CALLS, {**RESULT, "content": '"\\ud83d"'}, ASSISTANT], r"messages\[2\].content: holds half of a surr"),
        (
            [USER, {**CALLS, "tool_calls": [CALL, CALL]}],
            r"messages\[1\].tool_calls\[1\].id: 'abc123XYZ' is the id of an",
        ),
        ([USER, {**CALLS, "tool_calls": "f()"}], r"messages\[1\].tool_calls: expected a list of calls, got text"),
        (
            [USER, {**CALLS, "tool_calls": [1]}],
            r"messages\[1\].tool_calls\[0\]: expected an object with function, got a n",
        ),
        (
            [USER, {**CALLS, "tool_calls": [{**CALL, "id": 7}]}],
            r"messages\[1\].tool_calls\[0\].id: expected text, got a",
        ),
        (
            [{**USER, "tool_calls": [CALL]}, ASSISTANT],
            r"messages\[0\].tool_calls: in a message of user, but only assistant",
        ),
        ([USER, {**CALLS, "tool_calls": []}], r"messages\[1\].content: expected text, got null"),
        ([USER, {**CALLS, "weight": 0}], "messages: every assistant message has weight 0"),
    ],
)
def test_messages_that_are_refused(messages: list[dict[str, Any]], error: str) -> None:
    """A wrong order, id or call is refused with its place."""
    with pytest.raises(RowError, match=f"^{error}"):
        parse({"messages": messages})


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (
            {"name": "the weather"},
            r"function.name: 'the weather' is no function name, 1 to 64 letters, digits, underscore",
        ),
        ({"arguments": {}}, r"function.name: None is no function name"),
        ("weather", r"function: expected an object with a name, got text"),
        (
            {"name": "f", "arguments": "x"},
            r"function.arguments: expected JSON text, but it cannot be read: Expecting value",
        ),
        (
            {"name": "f", "arguments": "[1]"},
            r"function.arguments: expected an object or the JSON text of one, got a list",
        ),
        ({"name": "f", "arguments": '{"a": "\\ud83d"}'}, r"function.arguments: holds half of a surrogate pair"),
    ],
)
def test_calls_that_are_refused(function: object, error: str) -> None:
    """A call that names no function, or whose arguments are no JSON object, is refused with its place."""
    with pytest.raises(RowError, match=rf"^messages\[1\].tool_calls\[0\].{error}"):
        parse({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]})


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ("{", "tools: expected JSON text, but it cannot be read"),
        ({"name": "f"}, "tools: expected a list of function definitions, got an object"),
        (["f"], r"tools\[0\]: expected an object with type and function, got text"),
        ([{"type": "retrieval", "function": {"name": "f"}}], r"tools\[0\].type: 'retrieval' is not 'function'"),
        ([*TOOLS, {"function": {"name": ""}}], r"tools\[1\].function.name: '' is no function name"),
        ([{"name": "f", "parameters": []}], r"tools\[0\].parameters: expected an object, a JSON schema, got a list"),
        ([{"name": "f", "description": 1}], r"tools\[0\].description: expected text, got a number"),
    ],
)
def test_definitions_that_are_refused(tools: object, error: str) -> None:
    """A definition without a function is refused with its place."""
    with pytest.raises(RowError, match=f"^{error}"):
        parse({**ROW, "tools": tools})


def test_ids_of_openai_become_mistrals() -> None:
    """Ids that are not nine letters and digits are mapped to such, the same in call and result; others stay."""
    long = "call_9pw1qnYScqvGrCH58HWCvFH6"
    short = nine_letters(long)
    rows = [
        {"messages": [USER, {**CALLS, "tool_calls": [{**CALL, "id": id}]}, {**RESULT, "tool_call_id": id}, ASSISTANT]}
        for id in (long, short)
    ]
    assert decoded(rows[0]) == decoded(rows[1])
    assert decoded(rows[0])[0].count(short) == 2
    assert parse(rows[0]).messages[1].tool_calls[0].id == long


@given(st.sets(st.text(st.characters(exclude_categories=["Cs"])), max_size=20))
def test_nine_letters(texts: set[str]) -> None:
    """Any text becomes nine letters and digits, always the same ones, and different texts different ones."""
    ids = {nine_letters(text) for text in texts}
    assert len(ids) == len(texts)
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id) for id in ids)
    assert nine_letters("call_1") == "Rgj3pdhdm"


def test_a_call_at_the_end_without_id_has_none() -> None:
    """As in mistral-common, calls of the last message may lack their id, and then none is written."""
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": FUNCTION}]}]}
    (tokens,) = SampleEncoder.of(mistral_tokenizer()).encode([parse(row)])
    assert isinstance(tokens, Tokens)
    assert (tokens.ids.tolist(), tokens.ids[tokens.trained].tolist()) == expected(row)
    assert decoded(row)[1] == '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}]</s>'


def test_a_schema_is_written_as_it_is() -> None:
    """Parameters need not be a valid JSON schema, which mistral-common asks; keys it does not know are left out."""
    function = {**DEFINITION, "parameters": {"type": "no type"}, "strict": True, "returns": {"type": "string"}}
    whole, _ = decoded({**ROW, "tools": [{"type": "function", "function": function}]})
    assert '"parameters": {"type": "no type"}}}][/AVAILABLE_TOOLS]' in whole
    with pytest.raises(InvalidToolSchemaException):
        expected({**ROW, "tools": [{"type": "function", "function": function}]})


def test_ids_that_rows_lack_are_made() -> None:
    """Calls without ids that have results get distinct ids which depend on the calls alone, and results get theirs."""
    call = {"role": "assistant", "tool_calls": [{"function": FUNCTION}, {"function": FUNCTION}]}
    result = {"role": "tool", "content": "1"}
    row = {"messages": [USER, call, result, result, call, result, result, ASSISTANT]}
    messages = parse(row).messages
    ids = [c.id for m in messages for c in m.tool_calls]
    assert len(set(ids)) == 4
    assert [m.tool_call_id for m in messages if m.role == "tool"] == ids
    assert parse(row) == parse(row)


def test_what_mistrals_format_cannot_hold() -> None:
    """Words beside calls, and a tokenizer without the tokens of tools, make bad rows that say so."""
    both = parse({"messages": [USER, {**CALLS, "content": "I look."}]})
    (refused,) = SampleEncoder.of(mistral_tokenizer()).encode([both])
    assert "messages[1].content: text beside tool_calls" in str(refused)
    for row in (ROW, {"messages": ROW["messages"]}, {"messages": [USER, ASSISTANT], "tools": TOOLS}):
        (refused,) = SampleEncoder.of(byte_level_mistral()).encode([parse(row)])
        assert "tools: the tokenizer lacks some of Mistral's tokens for tools, [AVAILABLE_TOOLS]" in str(refused)


@given(chats(5))
def test_shortened(rows: list[dict[str, Any]]) -> None:
    """Each shorter conversation begins the whole one, ends in words, is trained, and is a valid row; longest first."""
    for row in rows:
        whole = parse(row)
        lengths = [len(whole.messages)]
        for short in whole.shortened():
            end = len(short.messages)
            assert end < lengths[-1]
            lengths.append(end)
            assert short == parse({**row, "messages": row["messages"][:end]})
            assert (short.messages[-1].role, short.messages[-1].tool_calls) == ("assistant", ())
        ends = [
            i + 1
            for i, m in enumerate(whole.messages[:-1])
            if m.role == "assistant"
            and not m.tool_calls
            and any(a.weight for a in whole.messages[: i + 1] if a.role == "assistant")
        ]
        assert lengths[1:] == ends[::-1]


def test_shortened_keeps_system_and_tools() -> None:
    """The system text and the definitions stand before the last question of the shorter conversation."""
    system = {"role": "system", "content": "Be brief."}
    row = {**ROW, "messages": [system, *ROW["messages"], USER, ASSISTANT, USER, CALLS]}
    first, second = parse(row).shortened()
    assert (len(first.messages), len(second.messages)) == (7, 5)
    tokenizer = mistral_tokenizer()
    (tokens,) = SampleEncoder.of(tokenizer).encode([second])
    assert isinstance(tokens, Tokens)
    assert tokenizer.decode(tokens.ids) == decoded({**ROW, "messages": [system, *ROW["messages"]]})[0]
