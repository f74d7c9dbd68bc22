"""Rows that hold a conversation: `messages`, prompt and completion as messages, ShareGPT and Alpaca."""

from mlx_trainer.data.samples.conversation import Conversation, Message, PromptCompletion, RowError
from mlx_trainer.data.samples.fields import (
    JsonObject,
    checked_text,
    filled,
    json_type,
    optional_text,
    text_at,
    trained_text,
)
from mlx_trainer.data.samples.layout import MESSAGES, SHAREGPT
from mlx_trainer.data.samples.messages import conversation_of, parse_list
from mlx_trainer.data.samples.tools import parse_tools


def parse_messages(row: JsonObject) -> Conversation:
    """`{"messages": [{"role": …, "content": …, "weight": 0 or 1}, …], "tools": […]}`; the tools may be absent."""
    messages = parse_list(row["messages"], "messages", MESSAGES)
    return conversation_of(messages, lambda number: f"messages[{number}]", parse_tools(row), MESSAGES)


def parse_sharegpt(row: JsonObject) -> Conversation:
    """`{"conversations": [{"from": "human" or "gpt", "value": …}, …], "system": …, "tools": …}`.

    Calls of tools are `function_call` messages whose value is the JSON text of one call or a list, results are
    `observation` messages, and `tools` is a list or its JSON text. `system` and `tools` may be absent.
    """
    messages = parse_list(row["conversations"], "conversations", SHAREGPT)
    system = system_message(optional_text(row, "system"))
    if system and messages and messages[0].role == "system":
        raise RowError("system: given beside the system message in conversations[0]; leave one of them out")
    return conversation_of(
        (*system, *messages), lambda number: f"conversations[{number - len(system)}]", parse_tools(row), SHAREGPT
    )


def parse_prompt_completion(row: JsonObject) -> PromptCompletion | Conversation:
    """`{"prompt": …, "completion": …}`, both plain text or both lists of messages, then with `tools` if there are any.

    Of lists, the answers of the completion are trained and those of the prompt are not.
    """
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return PromptCompletion(text_at(row, "prompt"), trained_text(row, "completion"))
    asked = parse_list(prompt, "prompt", MESSAGES, trained=False)
    answered = parse_list(completion, "completion", MESSAGES)
    for key, messages in (("prompt", asked), ("completion", answered)):
        if not messages:
            raise RowError(
                f"{key}: an empty list; the prompt ends with a question, the completion begins with its answer"
            )
    if answered[0].role != "assistant":
        raise RowError(
            f"completion[0].role: {answered[0].role!r} where 'assistant' is due; the others belong to prompt"
        )

    def place(number: int) -> str:
        return f"prompt[{number}]" if number < len(asked) else f"completion[{number - len(asked)}]"

    return conversation_of((*asked, *answered), place, parse_tools(row), MESSAGES, "completion")


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
