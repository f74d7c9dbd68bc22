"""The schema's dotted keys: what they are, the nearest one to a typing error, and values from a command line's text."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from types import NoneType
from typing import Any, get_args

from attrs import Attribute, fields

from mlx_trainer.config.option import is_list, mapping_of, members
from mlx_trainer.config.schema import Config


def sections() -> Mapping[str, type[Any]]:
    """Return the sections of a configuration by name, in the schema's order."""
    return {section.name: section.type for section in fields(Config) if section.type is not None}


def keys() -> Mapping[str, "Attribute[Any]"]:
    """Return every option by its dotted key, in the schema's order."""
    return {f"{name}.{option.name}": option for name, section in sections().items() for option in fields(section)}


def suggestion(name: str, section: str = "") -> str:
    """Return `did you mean …?` with the nearest key of the section, else of any section, else the keys there are."""
    siblings = [option.name for option in fields(sections()[section])] if section else list(sections())
    if near := get_close_matches(name, siblings, n=1):
        return f"did you mean {near[0]}?"
    elsewhere = {key.split(".")[1]: key for key in keys()}
    if near := get_close_matches(name, elsewhere, n=1, cutoff=0.75):
        return f"did you mean {elsewhere[near[0]]}?"
    return f"known keys: {', '.join(siblings)}"


def from_text(text: str, option: "Attribute[Any]") -> object:
    """Return the value a command line's `text` spells for `option`; text that spells none stays as it is.

    The strict reader then says what it should have been, as it does for a file.
    """
    kinds = members(option.type)
    if text == "null" and NoneType in kinds:
        return None
    if is_list(kinds[0]) and not text.startswith("["):
        return listed(text, kinds)
    if any(map(is_list, kinds)) and text.startswith("["):
        return flow(text, list)
    if mapping_of(kinds) and text.startswith("{"):
        return flow(text, dict)
    if bool in kinds:
        return {"true": True, "false": False}.get(text, text)
    return number(text, kinds)


def number(text: str, kinds: tuple[Any, ...]) -> object:
    """Return the number that `text` spells, where `kinds` has that kind; else the text."""
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def listed(text: str, kinds: tuple[Any, ...]) -> object:
    """Return the items of `a,b` as the list among `kinds` has them; text that names nothing stays text if it may."""
    if str in kinds and text and not re.fullmatch(r"[\w.]+(,[\w.]+)*", text):
        return text
    return [number(item, get_args(kinds[0])) for item in split_items(text)]


def split_items(text: str) -> list[str]:
    """Return the items of `a,b`; a comma before a space is a comma of the text."""
    return re.split(r",(?! )", text) if text else []


def flow(text: str, kind: type) -> object:
    """Return the list in `[a, "b, c"]` or the mapping in `{a: b}`; text that is none, as patterns may be, stays."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value: object = YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text
    return value if isinstance(value, kind) else text
