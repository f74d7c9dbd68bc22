"""Tools in a row: the functions that may be called, and the calls of a message."""

import json
import re
from functools import lru_cache

from mlx_trainer.data.samples.conversation import RowError, Tool, ToolCall
from mlx_trainer.data.samples.fields import (
    JsonObject,
    checked_text,
    json_in,
    json_text,
    json_type,
    optional_text,
    within,
)

FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""What OpenAI and Mistral accept as the name of a function."""


def parse_tools(row: JsonObject) -> tuple[Tool, ...]:
    """The row's `tools`: a list of function definitions or the JSON text of one; none where it is missing or empty."""
    value = row.get("tools")
    if not value:
        return ()
    return tools_in(value if isinstance(value, str) else json_text(value, "tools"))


@lru_cache(maxsize=256)
def tools_in(text: str) -> tuple[Tool, ...]:
    """The tools of a JSON list; rows of one file mostly share theirs, which are read once."""
    values = json_in(text, "tools")
    if not isinstance(values, list):
        raise RowError(f"tools: expected a list of function definitions, got {json_type(values)}")
    return tuple(parse_tool(value, f"tools[{number}]") for number, value in enumerate(values))


def parse_tool(value: object, where: str) -> Tool:
    """One definition, `{"type": "function", "function": {"name": …, …}}` or the inner object alone."""
    if not isinstance(value, dict):
        raise RowError(f"{where}: expected an object with type and function, got {json_type(value)}")
    if value.get("type", "function") != "function" and "function" in value:
        raise RowError(f"{where}.type: {value['type']!r} is not 'function', the only kind of tool there is")
    tool = value if "function" in value else {"function": value}
    try:
        name = function_name(tool["function"])
        optional_text(tool["function"], "description")
        parameters = tool["function"].get("parameters")
        if not isinstance(parameters, dict | None):
            raise RowError(f"parameters: expected an object, a JSON schema, got {json_type(parameters)}")
    except RowError as error:
        raise within(f"{where}.function" if "function" in value else where, error) from None
    return Tool(name, json_text({"type": "function", **tool}, where))


def function_name(function: object) -> str:
    """The name of a definition or a call; raises RowError from `function` on."""
    if not isinstance(function, dict):
        raise RowError(f": expected an object with a name, got {json_type(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise RowError(f"name: {name!r} is no function name, 1 to 64 letters, digits, underscores or dashes")
    return name


def parse_calls(value: object) -> tuple[ToolCall, ...]:
    """A message's calls, none where they are null; raises RowError from `tool_calls` on."""
    if not isinstance(value, list | None):
        raise RowError(f": expected a list of calls, got {json_type(value)}")
    calls: list[ToolCall] = []
    for number, item in enumerate(value or ()):
        try:
            calls.append(parse_call(item))
        except RowError as error:
            raise within(f"[{number}]", error) from None
        id = calls[-1].id
        if id is not None and any(call.id == id for call in calls[:-1]):
            raise RowError(f"[{number}].id: {id!r} is the id of an earlier call too; results could not be told apart")
    return tuple(calls)


def parse_call(value: object) -> ToolCall:
    """One call, `{"id": …, "function": {"name": …, "arguments": …}}` or the inner object alone, with the id or none.

    Mistral's own `"null"` and an empty id are read as none.
    """
    if not isinstance(value, dict):
        raise RowError(f": expected an object with function, got {json_type(value)}")
    id = None if value.get("id") in (None, "", "null") else checked_text(value["id"], "id")
    function = value.get("function", value)
    try:
        return ToolCall(function_name(function), parse_arguments(function.get("arguments")), id)
    except RowError as error:
        raise within("function", error) if "function" in value else error from None


def parse_arguments(value: object) -> str:
    """Arguments, an object or the JSON text of one, as the text of a JSON object; `{}` where there are none."""
    if value is None or value == "":
        return "{}"
    held = json_in(value, "arguments") if isinstance(value, str) else value
    if not isinstance(held, dict):
        raise RowError(f"arguments: expected an object or the JSON text of one, got {json_type(held)}")
    return json_text(held, "arguments")


def result_json(content: str) -> str:
    """A tool's result as JSON: what it holds where it is JSON itself, else its text as a string, `{}` where empty."""
    try:
        return json.dumps(json.loads(content or "{}"), ensure_ascii=False)
    except (ValueError, RecursionError):
        return json.dumps(content, ensure_ascii=False)
