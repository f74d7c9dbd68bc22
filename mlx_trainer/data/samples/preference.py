"""Rows of preferences: a prompt, a better continuation and a worse one."""

from attrs import evolve

from mlx_trainer.data.samples.conversation import Message, Preference, RowError
from mlx_trainer.data.samples.fields import JsonObject, text_at, trained_text
from mlx_trainer.data.samples.layout import MESSAGES, SHAREGPT, Layout, check_trained
from mlx_trainer.data.samples.messages import checked_messages, parse_list
from mlx_trainer.data.samples.tools import parse_tools

SIDES = ("chosen", "rejected")
SAME = "chosen, rejected: the same, so neither can be preferred"


def parse_preference(row: JsonObject) -> Preference:
    """`{"prompt": …, "chosen": …, "rejected": …}`, texts or lists of messages; raises RowError.

    Lists may begin with the prompt themselves; then it may be missing, or stand beside them once more. In
    LLaMA-Factory's ShareGPT rows the prompt is `conversations`, and each side is one message.
    """
    layout = SHAREGPT if "conversations" in row else MESSAGES
    key = layout.messages if layout is SHAREGPT else "prompt"
    given = parse_prompt(row, key, layout)
    chosen, rejected = (parse_side(row, side, layout) for side in SIDES)
    whole = any(side and side[0].role != "assistant" for side in (chosen, rejected))
    prompt = shared_prompt(chosen, rejected) if whole else given
    if not prompt:
        raise RowError(f"{key}: missing or empty; it is needed where chosen and rejected hold the answers alone")
    if any(message not in prompt for message in given):
        raise RowError(f"{key}: not what both chosen and rejected begin with; repair it or leave it out")
    skipped = len(prompt) if whole else 0
    (asked, better), (_, worse) = (
        continued(prompt, messages[skipped:], side, side if whole else key, layout)
        for side, messages in zip(SIDES, (chosen, rejected), strict=True)
    )
    if better == worse:
        raise RowError(SAME)
    return Preference(asked, better, worse, parse_tools(row))


def parse_prompt(row: JsonObject, key: str, layout: Layout) -> list[Message]:
    """The messages of the prompt, a user's message where it is text, none where it is missing."""
    value = row.get(key)
    if value is None:
        return []
    if isinstance(value, list):
        return parse_list(value, key, layout, trained=False)
    return [Message("user", text_at(row, key), 0)]


def parse_side(row: JsonObject, key: str, layout: Layout) -> list[Message]:
    """The messages of one side, a list, a single message, or the assistant's where it is text."""
    value = row[key]
    if isinstance(value, list | dict):
        return parse_list(value if isinstance(value, list) else [value], key, layout)
    return [Message("assistant", trained_text(row, key))]


def shared_prompt(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """What both sides begin with, its answers with weight 0; raises RowError where they part before an answer."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    if count == len(chosen) == len(rejected):
        raise RowError(SAME)
    parting = [side[count].role if count < len(side) else "nothing" for side in (chosen, rejected)]
    if parting != ["assistant", "assistant"]:
        raise RowError(
            f"chosen[{count}], rejected[{count}]: {parting[0]!r} and {parting[1]!r} where the two part; "
            "they must share the prompt and differ in the assistant's answer to it"
        )
    return [evolve(message, weight=0) for message in chosen[:count]]


def continued(
    prompt: list[Message], side: list[Message], key: str, prompt_key: str, layout: Layout
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The prompt and the side `key`, checked as one conversation; `prompt_key` is the list that holds the prompt."""
    count = len(prompt)

    def place(number: int) -> str:
        in_own_list = number >= count and key != prompt_key
        return f"{key if number >= count else prompt_key}[{number - count if in_own_list else number}]"

    messages = checked_messages([*prompt, *side], place, layout)
    check_trained(side, key, layout)
    return messages[:count], messages[count:]
