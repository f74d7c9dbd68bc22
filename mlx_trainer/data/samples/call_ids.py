"""Ids of calls of tools, and which result answers which call."""

from collections.abc import Sequence
from hashlib import blake2b

from attrs import evolve

from mlx_trainer.data.samples.conversation import Message, RowError, ToolCall
from mlx_trainer.data.samples.layout import Place

LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_LENGTH = 9
"""Letters and digits of an id as Mistral's models know it."""


def nine_letters(text: str) -> str:
    """Nine letters and digits that depend on `text` alone, as Mistral's ids of calls are; alike by chance in 1e16."""
    number = int.from_bytes(blake2b(text.encode(), digest_size=16).digest())
    letters = []
    for _ in range(ID_LENGTH):
        number, letter = divmod(number, len(LETTERS))
        letters.append(LETTERS[letter])
    return "".join(letters)


def link_results(messages: Sequence[Message], place: Place) -> tuple[Message, ...]:
    """`messages` in the right order, with every result naming the call it answers; raises RowError.

    A call without an id gets one that depends on its place among the calls and on what it calls, except in the last
    message. A result without an id answers the first open call, of its name if it has one.
    """
    linked: list[Message] = []
    waiting: list[ToolCall] = []
    number = 0
    for i, message in enumerate(messages):
        if message.tool_calls:
            if i + 1 < len(messages):
                calls = enumerate(message.tool_calls, number)
                message = evolve(message, tool_calls=tuple(with_id(call, k) for k, call in calls))
            number += len(message.tool_calls)
            waiting = list(message.tool_calls)
        elif message.role == "tool":
            call = answered_call(message, waiting, place(i))
            waiting.remove(call)
            message = evolve(message, tool_call_id=call.id, name=message.name or call.name)
        linked.append(message)
    return tuple(linked)


def with_id(call: ToolCall, number: int) -> ToolCall:
    """`call` with an id, made of its number and what it calls where it has none."""
    return call if call.id else evolve(call, id=nine_letters(f"{number} {call.name} {call.arguments}"))


def answered_call(result: Message, waiting: Sequence[ToolCall], where: str) -> ToolCall:
    """Which of the `waiting` calls a result answers; raises RowError naming `where` if it is none of them."""
    by_id = result.tool_call_id is not None
    for call in waiting:
        if call.id == result.tool_call_id if by_id else result.name in (None, call.name):
            return call
    wrong, key = (result.tool_call_id, "tool_call_id") if by_id else (result.name, "name")
    due = ", ".join(repr(call.id if by_id else call.name) for call in waiting)
    raise RowError(f"{where}.{key}: {wrong!r} is of no call that waits for its result; there is {due}")
