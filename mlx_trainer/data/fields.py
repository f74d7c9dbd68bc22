"""Reading the fields of a row, with the place of whatever is wrong in every error."""

from collections.abc import Mapping

from mlx_trainer.data.conversation import RowError

JsonObject = Mapping[str, object]


def json_type(value: object) -> str:
    """What JSON calls `value`, for error messages."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "text")


def text_at(row: JsonObject, key: str, where: str = "") -> str:
    """`row[key]` if it is text that can be encoded; raises RowError naming `where` and `key`."""
    if key not in row:
        raise RowError(f"{where}{key}: missing")
    return checked_text(row[key], where + key)


def checked_text(value: object, where: str) -> str:
    """`value` if it is text that can be encoded; raises RowError naming `where`."""
    if not isinstance(value, str):
        raise RowError(f"{where}: expected text, got {json_type(value)}")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RowError(f"{where}: holds half of a surrogate pair (such as \\ud83d), which is no Unicode text")
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
