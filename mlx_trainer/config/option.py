"""One option of the schema: its strict type, its valid range, and the sentence that errors and `--help` share."""

from collections.abc import Sequence
from math import inf
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from attrs import NOTHING, Attribute, Converter, field, frozen

from mlx_trainer.config.error import ConfigError

_WORDS: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@frozen
class Range:
    """The numbers an option takes: `at_least` and `at_most` are inclusive, `above` and `below` are not."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        """Whether `number` is finite and lies inside every bound."""
        return (
            abs(number) < inf
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return the bounds as a message says them."""
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


@frozen
class NotEmpty:
    """Any text or list but the empty one."""

    def __contains__(self, value: Sequence[object]) -> bool:
        """Whether `value` has an item that is not empty itself."""
        return len(value) > 0 and all(item != "" for item in value)

    def __str__(self) -> str:
        """Return the condition as a message says it."""
        return "not empty"


def option(help: str, default: Any = NOTHING, valid: Range | NotEmpty | None = None) -> Any:
    """Return an attrs field that takes its annotated type strictly and within `valid`; no default: it is required."""
    return field(
        default=default,
        converter=Converter(_convert, takes_field=True),
        validator=_check,
        metadata={"help": help, "valid": valid},
    )


def read(value: object, attribute: "Attribute[Any]") -> Any:
    """Return `value` as an option stores it, or raise `ValueError` with what the option takes."""
    converted = _convert(value, attribute)
    _check(None, attribute, converted)
    return converted


def expected(attribute: "Attribute[Any]") -> str:
    """Return what an option takes, in words: `a whole number, at least 1, or null`."""
    kinds = members(attribute.type)
    words = [_describe(kind) for kind in kinds if kind is not NoneType]
    if attribute.metadata["valid"] is not None:
        words.append(str(attribute.metadata["valid"]))
    return ", ".join(words) + (", or null" if NoneType in kinds else "")


def _convert(value: object, attribute: "Attribute[Any]") -> Any:
    kinds = members(attribute.type)
    if float in kinds and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if is_list(kinds[0]) and isinstance(value, list):
        return tuple(value)
    return value


def _check(_: object, attribute: "Attribute[Any]", value: Any) -> None:
    kinds, valid = members(attribute.type), attribute.metadata["valid"]
    fits = any(_fits(value, kind) for kind in kinds)
    if not fits or (valid is not None and value is not None and value not in valid):
        raise ConfigError(f"{attribute.name} is {show(value)}; it must be {expected(attribute)}")


def members(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of an annotation: (int, NoneType) for `int | None`."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def is_list(kind: Any) -> bool:
    """Whether an annotation is the schema's one list type, `Sequence[str]`."""
    return get_origin(kind) is Sequence


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    if is_list(kind):
        return isinstance(value, tuple) and all(type(item) is str for item in value)
    # `type(...) is`, not isinstance: True is an int to Python, and never a number here.
    return type(value) is kind


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    return _WORDS.get(kind, "a list of text")


def show(value: object) -> str:
    """Return a value as a message shows it: text in quotes, YAML's words for the rest, long ones shortened."""
    words: dict[object, str] = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool | None):
        return words[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
