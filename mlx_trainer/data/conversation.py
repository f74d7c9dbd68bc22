"""What a row of a file holds, before any token: a conversation, a prompt with its completion, or a text."""

from collections.abc import Mapping
from typing import Literal

from attrs import frozen

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class DataError(ValueError):
    """The data as a whole cannot be used; one paragraph says what was wrong and what would be right."""


class RowError(ValueError):
    """One row cannot be used; the text names the path inside the row, e.g. `messages[2].role: …`."""


@frozen
class Message:
    """One turn of a conversation; an assistant turn of weight 0 is read but not trained."""

    role: Role
    content: str
    weight: int = 1


@frozen
class Conversation:
    """An optional system message, then user and assistant messages in turn, the assistant's last."""

    messages: tuple[Message, ...]

    @property
    def system(self) -> str | None:
        """Text of the leading system message, None where there is none."""
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def turns(self) -> tuple[tuple[Message, Message], ...]:
        """Pairs of (user, assistant) messages."""
        spoken = self.messages[self.system is not None :]
        return tuple(zip(spoken[::2], spoken[1::2], strict=True))


@frozen
class PromptCompletion:
    """A prompt and the completion that is trained."""

    prompt: str
    completion: str

    def as_conversation(self) -> Conversation:
        """The same as one user message and its answer."""
        return Conversation((Message("user", self.prompt), Message("assistant", self.completion)))


@frozen
class Text:
    """Plain text, all of it trained."""

    text: str


Sample = Conversation | PromptCompletion | Text


@frozen
class Layout:
    """What a chat format calls its list of messages, the keys of a message, and each role; errors speak its names."""

    messages: str
    role: str
    content: str
    names: Mapping[str, Role]

    def name(self, role: Role) -> str:
        """The format's own name of `role`."""
        return next(name for name, meant in self.names.items() if meant == role)


MESSAGES = Layout("messages", "role", "content", {role: role for role in ROLES})
SHAREGPT = Layout("conversations", "from", "value", {"system": "system", "human": "user", "gpt": "assistant"})


def check_conversation(messages: tuple[Message, ...], layout: Layout = MESSAGES) -> Conversation:
    """`messages` as a Conversation; raises RowError where roles are out of order or nothing is trained."""
    first = 1 if messages and messages[0].role == "system" else 0
    user, assistant = layout.name("user"), layout.name("assistant")
    for number, message in enumerate(messages[first:]):
        where = f"{layout.messages}[{first + number}]"
        expected = ROLES[1 + number % 2]
        if message.role != expected:
            raise RowError(
                f"{where}.{layout.role}: {layout.name(message.role)!r} where {layout.name(expected)!r} is due; "
                f"an optional system message, then {user} and {assistant} in turn"
            )
        if message.role == "assistant" and not message.content.strip():
            raise RowError(f"{where}.{layout.content}: empty; a message of {assistant} needs text")
    if len(messages) == first:
        raise RowError(f"{layout.messages}: no {user} and {assistant} message")
    if messages[-1].role == "user":
        last = f"{layout.messages}[{len(messages) - 1}].{layout.role}"
        raise RowError(f"{last}: ends with {user!r}; nothing to train after it")
    if not any(message.weight for message in messages if message.role == "assistant"):
        raise RowError(f"{layout.messages}: every {assistant} message has weight 0, so nothing would be trained")
    return Conversation(messages)
