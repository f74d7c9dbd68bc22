"""What Mistral's own package makes of a row of messages: ids, and which of them belong to trained answers."""

import json
from functools import cache
from typing import Any

from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool, ToolCall
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from tests.data.tokenizers_for_tests import sentencepiece_file


@cache
def mistral_common_tokenizer() -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """Mistral's own tokenizer, version 3."""
    return MistralTokenizer.from_file(str(sentencepiece_file()), mode=ValidationMode.finetuning)


@cache
def sentencepiece() -> SentencePieceProcessor:
    """The SentencePiece model below it."""
    return SentencePieceProcessor(model_file=str(sentencepiece_file()))


def own_message(message: dict[str, Any]) -> Any:
    """A message in mistral-common's classes; calls without an id keep its `"null"`."""
    role, content = message["role"], message.get("content")
    if role == "system":
        return SystemMessage(content=content)
    if role == "user":
        return UserMessage(content=content)
    if role == "tool":
        return ToolMessage(content=content, tool_call_id=message["tool_call_id"])
    calls = [
        ToolCall(function=FunctionCall(**call["function"]), **({"id": call["id"]} if "id" in call else {}))
        for call in message.get("tool_calls", ())
    ]
    return AssistantMessage(content=content, tool_calls=calls or None)


def expected(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids of the row, and those of its trained answers alone, each encoded by itself and with its `</s>`."""
    tokenizer = mistral_common_tokenizer()
    tools = [Tool.from_openai(tool) for tool in row.get("tools", ())]
    request = ChatCompletionRequest(messages=[own_message(m) for m in row["messages"]], tools=tools or None)
    ids = list(tokenizer.encode_chat_completion(request).tokens)
    answers = [m for m in row["messages"] if m["role"] == "assistant" and m.get("weight", 1)]
    return ids, [id for answer in answers for id in answer_ids(answer)]


def answer_ids(answer: dict[str, Any]) -> list[int]:
    """An answer's ids by SentencePiece alone: words, or `[TOOL_CALLS]` (5) and the calls as JSON; then `</s>`."""
    if "tool_calls" not in answer:
        return [*sentencepiece().encode(answer["content"].rstrip(" ")), sentencepiece().eos_id()]
    calls = []
    for call in answer["tool_calls"]:
        arguments = call["function"]["arguments"]
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append({"name": call["function"]["name"], "arguments": parsed})
        if "id" in call:
            calls[-1]["id"] = call["id"]
    return [5, *sentencepiece().encode(json.dumps(calls, ensure_ascii=False)), sentencepiece().eos_id()]
