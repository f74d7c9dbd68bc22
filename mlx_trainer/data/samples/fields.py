"""Reading the fields of a row, with the place of whatever is wrong in every error.

A function that reads a part of a row names places from that part on; `within` puts the path of the part before them.
"""

import json
from collections.abc import Mapping

from mlx_trainer.data.samples.conversation import RowError

JsonObject = Mapping[str, object]


def json_type(value: object) -> str:
    """What JSON calls `value`, for error messages."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "text")


def within(place: str, error: RowError) -> RowError:
    """`error` of a part of the row as one of the row; without a key of its own, it concerns the part as a whole.

    >>> within("messages[2]", RowError("role: missing")), within("messages[2]", RowError(": expected an object"))
    (RowError('messages[2].role: missing'), RowError('messages[2]: expected an object'))
    """
    text = str(error)
    return RowError(f"{place}{'' if text[:1] in ':[' else '.'}{text}")


def text_at(row: JsonObject, key: str, where: str = "") -> str:
    """`row[key]` if it is text that can be encoded; raises RowError naming `where` and `key`."""
    if key not in row:
        raise RowError(f"{where}{key}: missing")
    value = row[key]
    if isinstance(value, str) and value.isascii():
        return value
    return checked_text(value, where + key)


def checked_text(value: object, where: str) -> str:
    """`value` if it is text that can be encoded; raises RowError naming `where`."""
    if not isinstance(value, str):
        raise RowError(f"{where}: expected text, got {json_type(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{where}: holds half of a surrogate pair (such as \\ud83d), which is no Unicode text") from None
    return value


def optional_text(row: JsonObject, key: str) -> str:
    """`row[key]`, or no text where it is missing or null, as tables write absent columns; raises RowError."""
    return "" if row.get(key) is None else text_at(row, key)


def trained_text(row: JsonObject, key: str) -> str:
    """`row[key]`, which must hold more than blanks; raises RowError."""
    return filled(text_at(row, key), key)


def filled(text: str, where: str) -> str:
    """`text`, which must hold more than blanks; raises RowError naming `where`."""
    if not text.strip():
        raise RowError(f"{where}: empty, so nothing would be trained")
    return text


def json_in(text: str, where: str) -> object:
    """What the JSON `text` holds; raises RowError naming `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: expected JSON text, but it cannot be read: {error}") from None


def json_text(value: object, where: str) -> str:
    """`value` as JSON text in which letters stand as they are; raises RowError naming `where`."""
    try:
        return checked_text(json.dumps(value, ensure_ascii=False), where)
    except RecursionError:
        raise RowError(f"{where}: lists or objects nested too deeply to be written as JSON") from None
