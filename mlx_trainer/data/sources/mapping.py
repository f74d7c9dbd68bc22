"""Rows that name keys and roles otherwise than their format: `{"prompt": "question"}` has prompts at `question`."""

import json
from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.samples.fields import JsonObject

LISTS = ("messages", "conversations")
"""Keys of the lists of messages, in messages and ShareGPT rows."""
MESSAGE_KEYS = frozenset({"role", "content", "weight", "name", "tool_calls", "tool_call_id", "from", "value"})
"""Keys of a message; elsewhere than in such a list they are keys of the row."""

Pairs = tuple[tuple[str, str], ...]


def sorted_pairs(names: Any) -> Pairs:
    """A mapping of text to text as sorted pairs; raises DataError."""
    if not isinstance(names, Mapping):
        raise DataError(f"A mapping of names is needed, such as {{'prompt': 'question'}}, not {names!r:.60}.")
    for name in (name for pair in names.items() for name in pair):
        if not isinstance(name, str) or not name:
            raise DataError(f"{name!r:.60} is no name. Names of fields and roles are text: {{'prompt': 'question'}}.")
    return tuple(sorted(names.items()))


@frozen
class FieldMapping:
    """What these rows call the fields and roles of their format.

    Args:
        fields: the format's key -> the rows' key, where dots reach into objects: `{"prompt": "data.question"}`. Keys of
            messages (`role`, `content`, …) are looked up in each message.
        roles: the rows' role -> the format's role: `{"human": "user", "bot": "assistant"}`.
    """

    fields: Pairs = field(factory=dict, converter=sorted_pairs)
    roles: Pairs = field(factory=dict, converter=sorted_pairs)

    @property
    def canonical(self) -> str:
        """Text that is equal for equal mappings, for the key of what was made with it."""
        return json.dumps([self.fields, self.roles])

    def apply(self, row: JsonObject) -> JsonObject:
        """`row` with the format's names; one whose keys are not there stays, so that its error names those it has."""
        if not (self.fields or self.roles):
            return row
        inner = {key: name for key, name in self.fields if key in MESSAGE_KEYS}
        row = rename(row, {key: name for key, name in self.fields if key not in MESSAGE_KEYS})
        for key in LISTS:
            if isinstance(messages := row.get(key), list):
                return {**row, key: [self.message(message, inner) for message in messages]}
        return rename(row, inner)

    def message(self, message: object, fields: Mapping[str, str]) -> object:
        """One message with the format's names."""
        if not isinstance(message, dict):
            return message
        roles = dict(self.roles)
        renamed = rename(message, fields)
        changed = {
            key: roles[name] for key in ("role", "from") if isinstance(name := renamed.get(key), str) and name in roles
        }
        return {**renamed, **changed}


def rename(row: JsonObject, fields: Mapping[str, str]) -> JsonObject:
    """`row` with the value at each of `fields`, key -> old key or dotted path, under the new key.

    Old keys are taken out, or they would tell another format; a value that the new key had is replaced. A path that
    leads nowhere changes nothing.
    """
    found = {key: value for key, path in fields.items() if (value := at(row, path)) is not MISSING}
    if not found:
        return row
    old = {fields[key] for key in found}
    return {**{key: value for key, value in row.items() if key not in old}, **found}


MISSING = object()


def at(row: JsonObject, path: str) -> object:
    """The value of the key `path` or, where there is none, at the keys that it has between its dots; else MISSING."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value
