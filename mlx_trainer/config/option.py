"""One option of the schema: its strict type, its valid range, and the sentence that errors and `--help` share."""

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from attrs import NOTHING, Attribute, Converter, field

from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.valid import Filled, NotEmpty, Range

_WORDS: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_MANY: dict[object, str] = {int: "whole numbers", float: "numbers", str: "text"}


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
    """Whether an annotation is a list, `Sequence[str]` or `Sequence[int]`."""
    return get_origin(kind) is Sequence


def mapping_of(kinds: Sequence[Any]) -> type | None:
    """Return what the mapping among `kinds` maps text to: `str`, `int`, `float`; None where there is no mapping."""
    return next((get_args(kind)[1] for kind in kinds if get_origin(kind) is Mapping), None)


def _fits(value: object, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return type(value) is str and value in get_args(kind)
    if is_list(kind):
        return isinstance(value, tuple) and all(type(item) is get_args(kind)[0] for item in value)
    if get_origin(kind) is Mapping:
        texts = isinstance(value, dict) and all(type(name) is str for name in value)
        return texts and all(type(item) is get_args(kind)[1] for item in value.values())  # type: ignore[attr-defined]
    # `type(...) is`, not isinstance: True is an int to Python, and never a number here.
    return type(value) is kind


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is Mapping:
        return f"a mapping of text to {_MANY[get_args(kind)[1]]}"
    return f"a list of {_MANY[get_args(kind)[0]]}" if is_list(kind) else _WORDS[kind]


def show(value: object) -> str:
    """Return a value as a message shows it: text in quotes, YAML's words for the rest, long ones shortened."""
    words: dict[object, str] = {True: "true", False: "false", None: "null"}
    if isinstance(value, bool | None):
        return words[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."
