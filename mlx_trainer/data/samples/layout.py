"""How formats name the parts of a conversation, and which order of roles makes one."""

from collections.abc import Callable, Mapping, Sequence

from attrs import frozen

from mlx_trainer.data.samples.conversation import Message, Role, RowError


@frozen
class Layout:
    """What a chat format calls its list of messages, the keys of a message, and each role; errors speak its names.

    A message of the role `calls`, where the format has one, holds calls of tools as JSON text in place of words.
    """

    messages: str
    role: str
    content: str
    names: Mapping[str, Role]
    calls: str | None = None

    def name(self, role: Role) -> str:
        """The format's own name of `role`, the first where it has several."""
        return next(name for name, meant in self.names.items() if meant == role)


MESSAGES = Layout(
    "messages", "role", "content", {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
)
SHAREGPT = Layout(
    "conversations",
    "from",
    "value",
    {"system": "system", "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"},
    calls="function_call",
)

Place = Callable[[int], str]
"""The path in the row of the message with a number, for errors."""


def check_order(messages: Sequence[Message], place: Place, layout: Layout = MESSAGES) -> None:
    """Raise RowError where a role is not due, an answer has no text, or the last message is not the assistant's."""
    due: tuple[Role, ...] = ("system", "user")
    waiting = 0
    for number, message in enumerate(messages):
        role = message.role
        if role not in due:
            raise RowError(f"{place(number)}.{layout.role}: {not_due(message, due, waiting, layout)}")
        if role == "assistant":
            waiting = len(message.tool_calls)
            due = ("tool",) if waiting else ("user",)
            if not waiting and not message.content.strip():
                raise RowError(f"{place(number)}.{layout.content}: empty; a message of {layout.name(role)} needs text")
        elif role == "tool":
            waiting -= 1
            due = ("tool",) if waiting else ("assistant", "user")
        else:
            due = ("assistant",) if role == "user" else ("user",)
    if messages and messages[-1].role in ("user", "tool"):
        last = layout.name(messages[-1].role)
        raise RowError(f"{place(len(messages) - 1)}.{layout.role}: ends with {last!r}; nothing to train after it")


def not_due(message: Message, due: Sequence[Role], waiting: int, layout: Layout) -> str:
    """What is wrong with the role of `message`, and which order would be right."""
    user, assistant, tool = (layout.name(role) for role in ("user", "assistant", "tool"))
    if due == ("tool",):
        order = f"{waiting} of the calls before it have no result yet, and each call needs its own"
    elif message.role == "tool":
        order = f"a message of {tool} answers a call of the {assistant} message before it, and here is none left"
    else:
        order = f"an optional system message, then {user} and {assistant} in turn"
    wanted = " or ".join(repr(layout.name(role)) for role in due if role != "system")
    return f"{layout.name(message.role)!r} where {wanted} is due; {order}"


def check_trained(messages: Sequence[Message], key: str, layout: Layout = MESSAGES) -> None:
    """Raise RowError naming the list `key` where it has no answer, or every one has weight 0."""
    weights = [message.weight for message in messages if message.role == "assistant"]
    if not any(weights):
        user, assistant = layout.name("user"), layout.name("assistant")
        if not weights:
            raise RowError(f"{key}: no {user} and {assistant} message")
        raise RowError(f"{key}: every {assistant} message has weight 0, so nothing would be trained")
