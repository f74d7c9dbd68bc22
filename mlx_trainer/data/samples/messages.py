"""Lists of messages, as chats, prompts, completions and preferences hold them."""

from collections.abc import Sequence

from mlx_trainer.data.samples.call_ids import link_results
from mlx_trainer.data.samples.conversation import Conversation, Message, Role, RowError, Tool, ToolCall
from mlx_trainer.data.samples.fields import JsonObject, checked_text, json_in, json_type, text_at, within
from mlx_trainer.data.samples.layout import Layout, Place, check_order, check_trained
from mlx_trainer.data.samples.tools import parse_calls, result_json


def parse_list(value: object, key: str, layout: Layout, *, trained: bool = True) -> list[Message]:
    """The messages of the list `row[key]`; in one that is not `trained`, answers have weight 0. Raises RowError."""
    if not isinstance(value, list):
        raise RowError(f"{key}: expected a list, got {json_type(value)}")
    messages: list[Message] = []
    for item in value:
        try:
            messages.append(parse_message(item, layout, trained))
        except RowError as error:
            raise within(f"{key}[{len(messages)}]", error) from None
    return messages


def parse_message(value: object, layout: Layout, trained: bool) -> Message:
    """One message; raises RowError from its keys on."""
    if not isinstance(value, dict):
        raise RowError(f": expected an object with {layout.role} and {layout.content}, got {json_type(value)}")
    name = text_at(value, layout.role)
    if name not in layout.names:
        raise RowError(f"{layout.role}: {name!r} is not one of {', '.join(layout.names)}")
    role = layout.names[name]
    weight = parse_weight(value, name, role, layout, trained)
    if role == "tool":
        return parse_result(value, layout)
    calls = parse_own_calls(value, name, layout)
    if calls and (name == layout.calls or value.get(layout.content) is None):
        return Message(role, "", weight, calls)
    if calls and role != "assistant":
        raise RowError(f"tool_calls: in a message of {name}, but only {layout.name('assistant')} calls tools")
    return Message(role, text_at(value, layout.content), weight, calls)


def parse_weight(value: JsonObject, name: str, role: Role, layout: Layout, trained: bool) -> int:
    """The weight of a message, by default 1 for an answer that may be trained; raises RowError."""
    usual = 1 if role == "assistant" and trained else 0
    weight = value.get("weight", usual)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"weight: {weight!r} is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise RowError(f"weight: 1 on a {name} message, but only {layout.name('assistant')} messages are trained")
    if weight == 1 and not trained:
        raise RowError("weight: 1 in a prompt, but only what follows the prompt is trained")
    return 1 if weight else 0


def parse_own_calls(value: JsonObject, name: str, layout: Layout) -> tuple[ToolCall, ...]:
    """The calls of a message, none where it has words alone; raises RowError."""
    if name == layout.calls:
        key, calls = layout.content, json_in(text_at(value, layout.content), layout.content)
    elif value.get("tool_calls"):
        key, calls = "tool_calls", value["tool_calls"]
    else:
        return ()
    if isinstance(calls, dict):
        calls = [calls]
    try:
        parsed = parse_calls(calls)
    except RowError as error:
        raise within(key, error) from None
    if not parsed:
        raise RowError(f"{key}: an empty list; a message of {name} holds one call or several")
    return parsed


def parse_result(value: JsonObject, layout: Layout) -> Message:
    """A tool's message; raises RowError."""
    content = text_at(value, layout.content)
    checked_text(result_json(content), layout.content)
    id, name = (value.get(key) for key in ("tool_call_id", "name"))
    return Message(
        "tool",
        content,
        0,
        tool_call_id=checked_text(id, "tool_call_id") if id else None,
        name=checked_text(name, "name") if name else None,
    )


def checked_messages(messages: Sequence[Message], place: Place, layout: Layout) -> tuple[Message, ...]:
    """`messages`, which must be in order and end with the assistant, with every result naming its call."""
    check_order(messages, place, layout)
    if any(message.tool_calls for message in messages):
        return link_results(messages, place)
    return tuple(messages)


def conversation_of(
    messages: Sequence[Message], place: Place, tools: tuple[Tool, ...], layout: Layout, key: str | None = None
) -> Conversation:
    """The conversation of `messages`, which stand in the list `key`, by default the layout's own.

    Raises RowError where they are out of order or nothing is trained.
    """
    checked = checked_messages(messages, place, layout)
    check_trained(checked, key or layout.messages, layout)
    return Conversation(checked, tools)
