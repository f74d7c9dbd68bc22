"""Row formats: which keys tell a format, and how its rows become samples.

A format is one entry of `FORMATS`, and `register_format` adds one. Each row is recognized by itself, so a file may mix
them; the first format whose keys are all present wins.
"""

from collections.abc import Callable
from typing import TypeVar

from attrs import frozen

from mlx_trainer.data.samples.chats import parse_alpaca, parse_messages, parse_prompt_completion, parse_sharegpt
from mlx_trainer.data.samples.conversation import DataError, RowError, Sample, Text
from mlx_trainer.data.samples.fields import JsonObject, trained_text
from mlx_trainer.data.samples.fields import text_at as text_at  # for formats of one's own
from mlx_trainer.data.samples.preference import parse_preference


@frozen
class Format:
    """A row format: the keys that a row of it must have, and the function that reads such a row."""

    keys: tuple[str, ...]
    parse: Callable[[JsonObject], Sample]


def parse_text(row: JsonObject) -> Text:
    """`{"text": …}`."""
    return Text(trained_text(row, "text"))


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), parse_messages),
    "prompt/completion": Format(("prompt", "completion"), parse_prompt_completion),
    "preference": Format(("chosen", "rejected"), parse_preference),
    "ShareGPT": Format(("conversations",), parse_sharegpt),
    # Before `text`, which Alpaca's own file has beside its other keys, written out with a template.
    "Alpaca": Format(("instruction", "output"), parse_alpaca),
    "text": Format(("text",), parse_text),
}

Parser = TypeVar("Parser", bound=Callable[[JsonObject], Sample])


def register_format(name: str, *keys: str) -> Callable[[Parser], Parser]:
    """Decorate a function that reads rows with all of `keys`; such a format is tried before those that exist.

    The function returns a Conversation, PromptCompletion, Text or Preference, and raises RowError for a row that
    cannot be used.
    Raises DataError where `name` is taken or there is no key to tell the format by.

    >>> from mlx_trainer.data.samples.conversation import PromptCompletion
    >>> @register_format("question/answer", "question", "answer")
    ... def parse_question(row: JsonObject) -> PromptCompletion:
    ...     return PromptCompletion(text_at(row, "question"), text_at(row, "answer"))
    """
    if name in FORMATS or not keys:
        raise DataError(f"The format {name!r} {'exists already' if keys else 'has no key to tell its rows by'}.")

    def register(parse: Parser) -> Parser:
        others = dict(FORMATS)
        FORMATS.clear()
        FORMATS.update({name: Format(keys, parse), **others})
        return parse

    return register


def detect_format(row: JsonObject) -> str:
    """Name of the format of `row` in `FORMATS`; raises RowError with the row's keys where none fits."""
    for name, candidate in FORMATS.items():
        if all(key in row for key in candidate.keys):
            return name
    found = ", ".join(repr(key) for key in list(row)[:6]) or "none"
    known = "; ".join(" and ".join(candidate.keys) for candidate in FORMATS.values())
    raise RowError(f"unknown format: the keys are {found}; a row needs one of: {known}")
