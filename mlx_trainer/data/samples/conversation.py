"""What a row of a file holds, before any token: a conversation, a pair of texts, a text, or a preference."""

from collections.abc import Iterator
from typing import Literal, Self

from attrs import evolve, frozen

Role = Literal["system", "user", "assistant", "tool"]


class DataError(ValueError):
    """The data as a whole cannot be used; one paragraph says what was wrong and what would be right."""


class RowError(ValueError):
    """One row cannot be used; the text names the path inside the row, e.g. `messages[2].role: …`."""


@frozen
class Tool:
    """A function that may be called; `definition` is the JSON text of `{"type": "function", "function": {…}}`."""

    name: str
    definition: str


@frozen
class ToolCall:
    """A call of a function: `arguments` are the text of a JSON object, `id` is what its result refers to.

    The id is None only in a conversation's last message, where no result follows, if the row gave none.
    """

    name: str
    arguments: str = "{}"
    id: str | None = None


@frozen
class Message:
    """One message; an assistant's of weight 0 is read but not trained, other roles are never trained.

    `tool_calls` belong to an assistant's message, `tool_call_id` and the function's `name` to that of a tool.
    """

    role: Role
    content: str
    weight: int = 1
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None


@frozen
class Conversation:
    """An optional system message, then user and assistant in turn, the assistant last; `tools` are what it may call.

    Between an assistant's message that calls tools and the next stand the results, one tool message for each call.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def system(self) -> str | None:
        """Text of the leading system message, None where there is none."""
        return self.messages[0].content if self.messages[0].role == "system" else None

    @property
    def answers(self) -> tuple[Message, ...]:
        """The assistant's messages, calls of tools included."""
        return tuple(message for message in self.messages if message.role == "assistant")

    def shortened(self) -> Iterator[Self]:
        """The conversation without its last turn, without its last two and so on, while something is still trained.

        Each ends with an answer in words, so that no call of a tool is cut off from its result.
        """
        for end in range(len(self.messages) - 1, 1, -1):
            rest = self.messages[:end]
            if rest[-1].role == "assistant" and not rest[-1].tool_calls:
                if not any(message.weight for message in rest if message.role == "assistant"):
                    return
                yield evolve(self, messages=rest)


@frozen
class PromptCompletion:
    """A prompt and the completion that is trained."""

    prompt: str
    completion: str

    def as_conversation(self) -> Conversation:
        """The same as one user message and its answer."""
        return Conversation((Message("user", self.prompt, 0), Message("assistant", self.completion)))


@frozen
class Text:
    """Plain text, all of it trained."""

    text: str


@frozen
class Preference:
    """A prompt with a better and a worse continuation, each of which ends with the assistant."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    def conversations(self) -> tuple[Conversation, Conversation]:
        """The chosen and the rejected conversation; answers in the prompt have weight 0, the others are trained."""
        prompt = tuple(evolve(message, weight=0) for message in self.prompt)
        return Conversation(prompt + self.chosen, self.tools), Conversation(prompt + self.rejected, self.tools)


Sample = Conversation | PromptCompletion | Text | Preference
