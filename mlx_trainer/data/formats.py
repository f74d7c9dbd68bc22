"""Row formats: which keys tell a format, and how its rows become samples.

A format is one entry of `FORMATS`. Each row is recognized by itself, so a file may mix them; the first format whose
keys are all present wins.
"""

from collections.abc import Callable, Mapping

from attrs import frozen

from mlx_trainer.data.conversation import (
    ROLES,
    Conversation,
    Message,
    PromptCompletion,
    RowError,
    Sample,
    Text,
    check_conversation,
)

JsonObject = Mapping[str, object]


@frozen
class Format:
    """A row format: the keys that a row of it must have, and the function that reads such a row."""

    keys: tuple[str, ...]
    parse: Callable[[JsonObject], Sample]


def text_at(row: JsonObject, key: str, where: str = "") -> str:
    """`row[key]` if it is text that can be encoded; raises RowError naming `where` and `key`."""
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{where}{key}: {'missing' if key not in row else f'expected text, got {json_type(value)}'}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RowError(f"{where}{key}: holds half of a surrogate pair (such as \\ud83d), which is no Unicode text")
    return value


def json_type(value: object) -> str:
    """What JSON calls `value`, for error messages."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "text")


def parse_message(value: object, where: str) -> Message:
    """One entry of `messages`; raises RowError naming `where` and the key."""
    if not isinstance(value, dict):
        raise RowError(f"{where}: expected an object with role and content, got {json_type(value)}")
    if value.get("tool_calls"):
        raise RowError(f"{where}.tool_calls: calls of tools cannot be encoded; leave such rows out")
    role = text_at(value, "role", f"{where}.")
    if role not in ROLES:
        raise RowError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    weight = value.get("weight", 1 if role == "assistant" else 0)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{where}.weight: {weight!r} is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"{where}.weight: 1 on a {role} message, but only assistant messages are trained")
    return Message(role, text_at(value, "content", f"{where}."), int(weight))


def parse_messages(row: JsonObject) -> Conversation:
    """`{"messages": [{"role": …, "content": …, "weight": 0 or 1}, …]}`."""
    if row.get("tools"):
        raise RowError("tools: definitions of tools cannot be encoded; leave such rows out")
    messages = row["messages"]
    if not isinstance(messages, list):
        raise RowError(f"messages: expected a list, got {json_type(messages)}")
    return check_conversation(tuple(parse_message(value, f"messages[{i}]") for i, value in enumerate(messages)))


def parse_prompt_completion(row: JsonObject) -> PromptCompletion:
    """`{"prompt": …, "completion": …}`, both plain text."""
    sample = PromptCompletion(text_at(row, "prompt"), text_at(row, "completion"))
    if not sample.completion.strip():
        raise RowError("completion: empty, so nothing would be trained")
    return sample


def parse_text(row: JsonObject) -> Text:
    """`{"text": …}`."""
    text = text_at(row, "text")
    if not text.strip():
        raise RowError("text: empty, so nothing would be trained")
    return Text(text)


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), parse_messages),
    "prompt/completion": Format(("prompt", "completion"), parse_prompt_completion),
    "text": Format(("text",), parse_text),
}


def detect_format(row: JsonObject) -> str:
    """Name of the format of `row` in `FORMATS`; raises RowError with the row's keys where none fits."""
    for name, candidate in FORMATS.items():
        if all(key in row for key in candidate.keys):
            return name
    found = ", ".join(repr(key) for key in list(row)[:6]) or "none"
    known = "; ".join(" and ".join(candidate.keys) for candidate in FORMATS.values())
    raise RowError(f"unknown format: the keys are {found}; a row needs one of: {known}")
