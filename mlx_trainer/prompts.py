"""How a prompt becomes ids: token for token as a training row begins, up to where the answer is due.

A room of its own between two that know nothing of each other: `data` can write rows, `models` answers prompts. What a
model is asked must look like what it was trained on, so both go through the same formats.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self, cast

from attrs import frozen

from mlx_trainer.data.encoding.encoder import chat_format
from mlx_trainer.data.encoding.mistral import MistralFormat
from mlx_trainer.data.encoding.template import TemplateFormat
from mlx_trainer.data.encoding.tokenizer import ChatTokenizer, TextEncoder
from mlx_trainer.data.samples.conversation import Conversation, DataError, Message, RowError
from mlx_trainer.data.samples.fields import checked_text
from mlx_trainer.data.samples.layout import MESSAGES
from mlx_trainer.data.samples.messages import checked_messages, parse_list
from mlx_trainer.data.samples.tools import parse_tools

Prompt = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text, a list of messages whose last is the user's or a tool's, or a row `{"messages": […], "tools": […]}`."""
DUE = Message("assistant", "the answer")


class PromptError(ValueError):
    """A prompt cannot be written for this model; the text names the place inside the prompt."""


@frozen
class PromptEncoder:
    """Writes prompts for one tokenizer; cheap to call, while `of` copies the tokenizer."""

    bos: int | None
    templated: bool
    texts: TextEncoder
    format: MistralFormat | TemplateFormat | None

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> "PromptEncoder":
        """The encoder for `tokenizer` as it is now; raises PromptError where it is not one of the tokenizers library.

        The last ones are kept: a vocabulary of 32,768 takes a tenth of a second.
        """
        known: Any = tokenizer
        return encoder_of(known, tokenizer.chat_template, len(known))

    @classmethod
    def new(cls, tokenizer: ChatTokenizer) -> Self:
        """A new encoder."""
        try:
            texts = TextEncoder(tokenizer)
        except DataError as error:
            raise PromptError(str(error)) from error
        return cls(tokenizer.bos_token_id, tokenizer.chat_template is not None, texts, chat_format(tokenizer, texts))

    def encode(self, prompt: Prompt, system: str | None = None) -> list[int]:
        """The ids of `prompt`, after the text `system` if that is given; raises PromptError.

        A text is one user message. Where the tokenizer has no chat template it stands as it is instead, as rows of
        `{"text": …}` do, for a base model to continue; lists of messages are never written so.
        """
        try:
            if isinstance(prompt, str) and not self.templated and system is None:
                return self.continued(prompt)
            return self.asked(conversation_of(prompt, system))
        except RowError as error:
            raise PromptError(str(error)) from error

    def continued(self, text: str) -> list[int]:
        """The beginning-of-text token, where there is one, and the ids of `text`."""
        start = [] if self.bos is None else [self.bos]
        return start + self.texts.encode([checked_text(text, "prompt")])[0]

    def asked(self, conversation: Conversation) -> list[int]:
        """The ids of a conversation whose answer is due; raises RowError where the format cannot hold it."""
        if isinstance(self.format, TemplateFormat):
            return self.format.prompt(conversation)
        if self.format is None:
            raise RowError("this tokenizer has no chat template, so a prompt must be text, not a list of messages")
        (row,) = self.format.encode([conversation], self.texts)
        if isinstance(row, RowError):
            raise row
        return [int(id) for id in row.ids]


def read_prompts(path: Path) -> list[tuple[Prompt, str | None]]:
    """The prompts of a file, each with the answer that its row has, if any; raises PromptError with file and line.

    A prompt is a line; in a `.jsonl` file a row with `prompt`, a text or messages, or with `messages`, whose last
    answer is the one that is asked for. Empty lines are passed over. Raises OSError.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from error
    asked = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [(line, None) for _, line in asked]
    prompts = []
    for number, line in asked:
        try:
            prompts.append(prompt_of(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{path}:{number}: {error}") from error
    return prompts


def prompt_of(row: object) -> tuple[Prompt, str | None]:
    """The prompt of a row and its own answer, if it has one; raises PromptError for another row."""
    if not isinstance(row, Mapping) or not ("prompt" in row or "messages" in row):
        raise PromptError("this is no object with `prompt` or `messages`")
    prompt, answer = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str):
        return prompt, answer if isinstance(answer, str) else None
    messages = row["messages"] if prompt is None else prompt
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, Mapping) and last.get("role") == "assistant":
        messages, answer = messages[:-1], last.get("content")
    return {**row, "messages": messages}, answer if isinstance(answer, str) else None


@lru_cache(maxsize=4)
def encoder_of(tokenizer: Hashable, template: Hashable, size: int) -> PromptEncoder:
    """The encoder for `tokenizer`, which has this template and so many tokens now."""
    return PromptEncoder.new(cast(ChatTokenizer, tokenizer))


def conversation_of(prompt: Prompt, system: str | None = None) -> Conversation:
    """The conversation that a prompt is, without the answer that is due; raises RowError as for a training row."""
    row = prompt if isinstance(prompt, Mapping) else {"messages": prompt}
    if isinstance(prompt, str):
        row = {"messages": [{"role": "user", "content": prompt}]}
    messages = parse_list(row.get("messages"), "messages", MESSAGES)
    if not messages:
        raise RowError("messages: an empty list; the last message is the one to answer")
    if messages[-1].role == "assistant":
        raise RowError(f"messages[{len(messages) - 1}].role: ends with 'assistant', but it is the user's turn to ask")
    first = 0 if system is None else 1
    if first and messages[0].role == "system":
        raise RowError("messages[0]: a system message beside the text of `system`; leave one of them out")
    before = [Message("system", checked_text(system, "system"), 0)] if first else []
    whole = checked_messages([*before, *messages, DUE], lambda number: f"messages[{number - first}]", MESSAGES)
    return Conversation(whole[:-1], parse_tools(row))
