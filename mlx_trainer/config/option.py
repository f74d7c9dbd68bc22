"""One option of the schema: its strict type, its valid range, and the sentence that errors and `--help` share."""

from collections.abc import Mapping, Sequence
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
    """Any text, list or mapping but the empty one; the numbers of a mapping lie inside `weights`."""

    weights: Range | None = None

    def __contains__(self, value: Sequence[object] | Mapping[str, object]) -> bool:
        """Whether `value` has an item that is not empty itself."""
        return (
            len(value) > 0 and _filled(value) and all(number in (self.weights or Range()) for number in _floats(value))
        )

    def __str__(self) -> str:
        """Return the condition as a message says it."""
        return "not empty" if self.weights is None else f"not empty, weights {self.weights}"


@frozen
class Filled:
    """Any mapping, the empty one too, whose keys and values are not empty themselves."""

    def __contains__(self, value: Mapping[str, object]) -> bool:
        """Whether nothing in `value` is empty."""
        return _filled(value)

    def __str__(self) -> str:
        """Return the condition as a message says it."""
        return "none of it empty"


def _filled(value: Sequence[object] | Mapping[str, object]) -> bool:
    return all(item != "" for item in (*value, *(value.values() if isinstance(value, Mapping) else ())))


def _floats(value: Sequence[object] | Mapping[str, object]) -> list[float]:
    return [item for item in value.values() if isinstance(item, float)] if isinstance(value, Mapping) else []


def option(help: str, default: Any = NOTHING, valid: Range | NotEmpty | Filled | None = None) -> Any:
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
    *others, last = [_describe(kind) for kind in kinds if kind is not NoneType]
    words = [f"{', '.join(others)} or {last}" if others else last]
    if attribute.metadata["valid"] is not None:
        words.append(str(attribute.metadata["valid"]))
    return ", ".join(words) + (", or null" if NoneType in kinds else "")


def _convert(value: object, attribute: "Attribute[Any]") -> Any:
    kinds = members(attribute.type)
    if float in kinds:
        return _as_float(value)
    if isinstance(value, list) and any(map(is_list, kinds)):
        return tuple(value)
    if isinstance(value, Mapping) and (kind := mapping_of(kinds)):
        return {name: _as_float(item) if kind is float else item for name, item in value.items()}
    return value


def _as_float(value: object) -> object:
    return float(value) if type(value) is int and abs(value) <= 2**53 else value


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


def mapping_of(kinds: Sequence[Any]) -> type | None:
    """Return what the mapping among `kinds` maps text to, `str` or `float`; None where there is no mapping."""
    return next((get_args(kind)[1] for kind in kinds if get_origin(kind) is Mapping), None)


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    if is_list(kind):
        return isinstance(value, tuple) and all(type(item) is str for item in value)
    if get_origin(kind) is Mapping:
        texts = isinstance(value, dict) and all(type(name) is str for name in value)
        return texts and all(type(item) is get_args(kind)[1] for item in value.values())  # type: ignore[attr-defined]
    # `type(...) is`, not isinstance: True is an int to Python, and never a number here.
    return type(value) is kind


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is Mapping:
        return f"a mapping of text to {'numbers' if get_args(kind)[1] is float else 'text'}"
    return _WORDS.get(kind, "a list of text")


def show(value: object) -> str:
    """Return a value as a message shows it: text in quotes, YAML's words for the rest, long ones shortened."""
    words: dict[object, str] = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool | None):
        return words[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
