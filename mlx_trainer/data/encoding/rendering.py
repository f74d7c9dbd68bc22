"""Conversations as chat templates take them, and the proof that a template writes their tools."""

import json
from collections.abc import Sequence
from typing import Any

from attrs import evolve, frozen

from mlx_trainer.data.encoding.tokenizer import ChatTokenizer
from mlx_trainer.data.samples.conversation import Conversation, Message, RowError, Tool, ToolCall

PROBE = "probe{}of{}"


@frozen
class Renderer:
    """Writes conversations with the chat template of a tokenizer."""

    tokenizer: ChatTokenizer

    def render(self, conversation: Conversation, count: int, *, prompt: bool = False) -> str:
        """The first `count` messages as the template writes them; with `prompt`, as when an answer is asked for."""
        messages = as_objects(conversation.messages[:count])
        return str(
            self.tokenizer.apply_chat_template(
                messages, tools=tool_objects(conversation.tools), tokenize=False, add_generation_prompt=prompt
            )
        )

    def around_answers(self, conversation: Conversation) -> list[str] | RowError:
        """For each answer what stands before it, as when it is asked for, and the row up to its end."""
        texts: list[str] = []
        for number in answer_numbers(conversation):
            try:
                texts += self.render(conversation, number, prompt=True), self.render(conversation, number + 1)
            except Exception as error:
                return RowError(
                    f"messages[{number}]: the chat template cannot write the part before this answer by itself, so the "
                    f"answer's tokens cannot be told: {error}"
                )
        return texts

    def refusal(self, conversation: Conversation) -> RowError | None:
        """Why the template does not write the row: it fails, or leaves out tools."""
        try:
            self.render(conversation, len(conversation.messages))
            if conversation.tools or any(message.tool_calls for message in conversation.messages):
                return self.left_out(conversation)
        except Exception as error:  # a template is a program of someone else's, in a sandbox
            return RowError(f"messages: the chat template refuses them: {error}")
        return None

    def left_out(self, conversation: Conversation) -> RowError | None:
        """Which of the row's tools, calls or results the template leaves out, if any.

        Templates without support for tools pass over them in silence. So the row is rendered with words in their place
        that stand nowhere else, and each must be found.
        """
        probe, places = probed(conversation)
        text = self.render(probe, len(probe.messages))
        for word, (place, what) in places.items():
            if word not in text:
                return RowError(
                    f"{place}: the chat template leaves out {what}; use a tokenizer whose template has tools, "
                    "or leave such rows out"
                )
        return None


def answer_numbers(conversation: Conversation) -> list[int]:
    """Where the assistant's messages stand."""
    return [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]


def as_objects(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, but with arguments as objects: as text, templates would quote them once more."""
    objects = []
    for message in messages:
        written: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            written["tool_calls"] = [call_object(call) for call in message.tool_calls]
        if message.tool_call_id:
            written["tool_call_id"] = message.tool_call_id
        if message.name:
            written["name"] = message.name
        objects.append(written)
    return objects


def call_object(call: ToolCall) -> dict[str, Any]:
    """A call in OpenAI's form with its arguments as an object; without an id where there is none."""
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return ({"id": call.id} if call.id else {}) | {"type": "function", "function": function}


def tool_objects(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Definitions of tools in OpenAI's form, None where there are none."""
    return [json.loads(tool.definition) for tool in tools] or None


def probed(conversation: Conversation) -> tuple[Conversation, dict[str, tuple[str, str]]]:
    """The conversation with a word in place of each tool's, call's and result's name or text, and where each stands."""
    mark = PROBE.format("{}", len(conversation.messages))
    places: dict[str, tuple[str, str]] = {}

    def word(place: str, what: str) -> str:
        new = mark.format(len(places))
        places[new] = place, what
        return new

    tools = tuple(
        renamed(tool, word(f"tools[{i}]", f"the tool {tool.name!r}")) for i, tool in enumerate(conversation.tools)
    )
    messages = []
    for i, message in enumerate(conversation.messages):
        if message.role == "tool":
            message = evolve(message, content=word(f"messages[{i}]", "the tool's result"))
        calls = tuple(
            evolve(call, name=word(f"messages[{i}].tool_calls[{k}]", f"the call of {call.name!r}"))
            for k, call in enumerate(message.tool_calls)
        )
        messages.append(evolve(message, tool_calls=calls))
    return Conversation(tuple(messages), tools), places


def renamed(tool: Tool, name: str) -> Tool:
    """The tool under another name."""
    definition = json.loads(tool.definition)
    return Tool(name, json.dumps({**definition, "function": {**definition["function"], "name": name}}))
