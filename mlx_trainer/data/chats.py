"""Rows that hold a conversation: `messages`, ShareGPT and Alpaca."""

from mlx_trainer.data.conversation import (
    MESSAGES,
    SHAREGPT,
    Conversation,
    Layout,
    Message,
    RowError,
    check_conversation,
)
from mlx_trainer.data.fields import JsonObject, checked_text, filled, json_type, optional_text, text_at, trained_text


def parse_message(value: object, where: str, layout: Layout) -> Message:
    """One message of a chat; raises RowError naming `where` and the key."""
    if not isinstance(value, dict):
        wanted = f"an object with {layout.role} and {layout.content}"
        raise RowError(f"{where}: expected {wanted}, got {json_type(value)}")
    if value.get("tool_calls"):
        raise RowError(f"{where}.tool_calls: calls of tools cannot be encoded; leave such rows out")
    name = text_at(value, layout.role, f"{where}.")
    if name not in layout.names:
        raise RowError(f"{where}.{layout.role}: {name!r} is not one of {', '.join(layout.names)}")
    role = layout.names[name]
    weight = value.get("weight", 1 if role == "assistant" else 0)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"{where}.weight: {weight!r} is neither 0 nor 1")
    if weight == 1 and role != "assistant":
        raise RowError(
            f"{where}.weight: 1 on a {name} message, but only {layout.name('assistant')} messages are trained"
        )
    return Message(role, text_at(value, layout.content, f"{where}."), int(weight))


def parse_chat(row: JsonObject, layout: Layout) -> Conversation:
    """The list of messages that `layout` describes."""
    if row.get("tools"):
        raise RowError("tools: definitions of tools cannot be encoded; leave such rows out")
    key = layout.messages
    messages = row[key]
    if not isinstance(messages, list):
        raise RowError(f"{key}: expected a list, got {json_type(messages)}")
    parsed = tuple(parse_message(value, f"{key}[{i}]", layout) for i, value in enumerate(messages))
    return check_conversation(parsed, layout)


def parse_messages(row: JsonObject) -> Conversation:
    """`{"messages": [{"role": …, "content": …, "weight": 0 or 1}, …]}`."""
    return parse_chat(row, MESSAGES)


def parse_sharegpt(row: JsonObject) -> Conversation:
    """`{"conversations": [{"from": "human" or "gpt", "value": …}, …], "system": …}`; the system text may be absent."""
    conversation = parse_chat(row, SHAREGPT)
    system = optional_text(row, "system")
    if system and conversation.system is not None:
        raise RowError("system: given beside the system message in conversations[0]; leave one of them out")
    return Conversation((*system_message(system), *conversation.messages))


def parse_alpaca(row: JsonObject) -> Conversation:
    """`{"instruction": …, "input": …, "output": …, "system": …, "history": [[question, answer], …]}`.

    `input`, `system` and `history` may be absent. Instruction and input are joined by a line end, and the answers of
    the history are trained, as LLaMA-Factory does both (its data/README.md).
    """
    instruction, extra = text_at(row, "instruction"), optional_text(row, "input")
    question = "\n".join(part for part in (instruction, extra) if part)
    pairs = [*parse_history(row.get("history")), (question, trained_text(row, "output"))]
    turns = [
        message for asked, answer in pairs for message in (Message("user", asked, 0), Message("assistant", answer))
    ]
    return Conversation((*system_message(optional_text(row, "system")), *turns))


def parse_history(value: object) -> list[tuple[str, str]]:
    """Earlier (question, answer) pairs of an Alpaca row; raises RowError naming the place."""
    if not isinstance(value, list | None):
        raise RowError(f"history: expected a list of [question, answer] pairs, got {json_type(value)}")
    pairs = []
    for i, pair in enumerate(value or ()):
        if not (isinstance(pair, list) and len(pair) == 2):
            raise RowError(f"history[{i}]: expected a pair, [question, answer]")
        question, answer = (checked_text(text, f"history[{i}][{k}]") for k, text in enumerate(pair))
        pairs.append((question, filled(answer, f"history[{i}][1]")))
    return pairs


def system_message(text: str) -> tuple[Message, ...]:
    """A system message of `text`, or none where it is empty."""
    return (Message("system", text, 0),) if text else ()
