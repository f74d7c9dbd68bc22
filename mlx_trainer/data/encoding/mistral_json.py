"""Definitions of tools, calls and results as the JSON text that Mistral's models know."""

import json
import re
from collections.abc import Sequence
from functools import lru_cache

from mlx_trainer.data.samples.call_ids import nine_letters
from mlx_trainer.data.samples.conversation import Message, Tool, ToolCall
from mlx_trainer.data.samples.tools import result_json

CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


@lru_cache(maxsize=256)
def written_tools(tools: tuple[Tool, ...]) -> str:
    """The definitions as JSON, each with name, description and parameters alone, in this order."""
    functions = [json.loads(tool.definition)["function"] for tool in tools]
    definitions = [
        {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": function.get("parameters") or {},
            },
        }
        for function in functions
    ]
    return json.dumps(definitions, ensure_ascii=False)


def written_calls(calls: Sequence[ToolCall]) -> str:
    """Calls as JSON; the id is left out where there is none."""
    written = (
        f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}'
        + (f', "id": "{mistral_id(call.id)}"}}' if call.id else "}")
        for call in calls
    )
    return f"[{', '.join(written)}]"


def written_result(message: Message) -> str:
    """A result as JSON, its content as the JSON it holds or as a string."""
    return f'{{"content": {result_json(message.content)}, "call_id": "{mistral_id(message.tool_call_id or "")}"}}'


def mistral_id(id: str) -> str:
    """The id of a call as Mistral knows it: nine letters and digits stay, others such as `call_…` become such ones."""
    return id if CALL_ID.fullmatch(id) else nine_letters(id)
