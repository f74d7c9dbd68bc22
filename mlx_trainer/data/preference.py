"""Rows of preferences: a prompt, a better continuation and a worse one."""

from attrs import evolve

from mlx_trainer.data.conversation import Message, Preference, RowError
from mlx_trainer.data.fields import JsonObject, text_at, trained_text
from mlx_trainer.data.layout import MESSAGES, SHAREGPT, Layout, check_trained
from mlx_trainer.data.messages import checked_messages, parse_list
from mlx_trainer.data.tools import parse_tools

SIDES = ("chosen", "rejected")


def parse_preference(row: JsonObject) -> Preference:
    """`{"prompt": …, "chosen": …, "rejected": …}`, texts or lists of messages; raises RowError.

    Lists may begin with the prompt themselves; then it may be missing, or stand beside them once more. In
    LLaMA-Factory's ShareGPT rows the prompt is `conversations`, and each side is one message.
    """
    layout = SHAREGPT if "conversations" in row else MESSAGES
    key = layout.messages if layout is SHAREGPT else "prompt"
    given = parse_prompt(row, key, layout)
    chosen, rejected = (parse_side(row, side, layout) for side in SIDES)
    begun = [bool(side) and side[0].role != "assistant" for side in (chosen, rejected)]
    if not any(begun) and not given:
        raise RowError(f"{key}: missing or empty; it is needed where chosen and rejected hold the answers alone")
    if any(begun):
        prompt = shared_prompt(chosen, rejected)
        if any(message not in prompt for message in given):
            raise RowError(f"{key}: not what both chosen and rejected begin with; repair it or leave it out")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        keys = SIDES
    else:
        prompt, keys = given, (key, key)
    (asked, better), (_, worse) = (
        continued(prompt, side, paths, layout)
        for side, paths in ((chosen, (keys[0], "chosen")), (rejected, (keys[1], "rejected")))
    )
    if better == worse:
        raise RowError("chosen, rejected: the same, so neither can be preferred")
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
        raise RowError("chosen, rejected: the same, so neither can be preferred")
    parting = [side[count].role if count < len(side) else "nothing" for side in (chosen, rejected)]
    if parting != ["assistant", "assistant"]:
        raise RowError(
            f"chosen[{count}], rejected[{count}]: {parting[0]!r} and {parting[1]!r} where the two part; "
            "they must share the prompt and differ in the assistant's answer to it"
        )
    return [evolve(message, weight=0) for message in chosen[:count]]


def continued(
    prompt: list[Message], side: list[Message], keys: tuple[str, str], layout: Layout
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The prompt and one side, checked as one conversation; `keys` are the lists of the row that hold the two."""
    own = 0 if keys[0] == keys[1] else len(prompt)
    messages = checked_messages(
        [*prompt, *side], lambda i: f"{keys[i >= len(prompt)]}[{i - own if i >= len(prompt) else i}]", layout
    )
    check_trained(side, keys[1], layout)
    return messages[: len(prompt)], messages[len(prompt) :]
