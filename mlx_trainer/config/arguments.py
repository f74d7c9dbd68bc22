"""The schema as command-line options: `--section.key VALUE`, with defaults, ranges and help from the schema."""

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

from attrs import NOTHING, Attribute, fields

from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.keys import flow, from_text, keys, number, sections, split_items
from mlx_trainer.config.option import expected, is_list, mapping_of, members, show

METAVARS: Mapping[object, str] = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
PAIRS: Mapping[str, str] = {"nargs": "+", "action": "extend"}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`, and whose options are absent from the result unless given."""

    def __init__(self, prog: str, description: str, usage: str) -> None:
        """Take the program's name, what it does, and its usage line."""
        columns = min(shutil.get_terminal_size().columns, 120)
        layout = partial(argparse.HelpFormatter, max_help_position=columns // 2 - 8, width=columns - 2)
        super().__init__(
            prog,
            usage,
            description,
            formatter_class=layout,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of ending the process."""
        raise ConfigError(message)

    def given(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return what `arguments` say, by destination; an unknown option is refused with the nearest one."""
        values, unknown = self.parse_known_intermixed_args(list(arguments))
        if unknown:
            raise ConfigError(self._unknown(unknown[0].split("=")[0]))
        return vars(values)

    def _unknown(self, option: str) -> str:
        near = get_close_matches(option, self._option_string_actions, n=1)
        return f"{option} is not an option; " + (f"did you mean {near[0]}?" if near else f"see {self.prog} --help")


def add_options(parser: argparse.ArgumentParser, names: Sequence[str], short: Mapping[str, str]) -> None:
    """Add an option for each key of the sections `names`, one group a section; `short` gives keys a second name."""
    for name in names:
        section = sections()[name]
        group = parser.add_argument_group(name, section.__doc__)
        for option in fields(section):
            key = f"{name}.{option.name}"
            spellings = [f"--{key}", short[key]] if key in short else [f"--{key}"]
            words: Any = PAIRS if _is_mapping(option) else {}
            group.add_argument(*spellings, dest=key, metavar=_metavar(option), help=_help(option), **words)


def overrides(given: Mapping[str, Any]) -> dict[str, object]:
    """Return the keys of the schema among what was given, each as its option's type."""
    return {
        key: pairs(key, words, keys()[key]) if isinstance(words, list) else from_text(words, keys()[key])
        for key, words in given.items()
        if key in keys()
    }


def pairs(key: str, words: Sequence[str], option: "Attribute[Any]") -> object:
    """Return the mapping in the words `a=b c=d`, `a=b,c=d` or `{a: b}`; raises ConfigError for what is no pair."""
    if len(words) == 1 and words[0].startswith("{"):
        return flow(words[0], dict)
    mapping: dict[str, object] = {}
    kinds = (mapping_of(members(option.type)),)
    for item in (item for word in words for item in split_items(word)):
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--{key}: {item!r} is no pair such as a=b; files stand before this option")
        if name in mapping:
            raise ConfigError(f"--{key}: {name!r} is given twice, as {mapping[name]!r} and {value!r}; give it once")
        mapping[name] = number(value, kinds)
    return mapping


def dataset_of(words: Sequence[str]) -> str | list[str] | dict[str, float]:
    """Return `data.dataset_path` as the data files on a command line say it; `words` are not empty.

    One path is text, several are a list. `chats.jsonl=0.5` has a weight, unless a file has that very name; where any
    has one, the others weigh 1. Raises ConfigError where a path with a weight is given again.
    """
    entries = [weighed(word) for word in words]
    if all(weight is None for _, weight in entries):
        return words[0] if len(words) == 1 else list(words)
    weights: dict[str, float] = {}
    for path, weight in entries:
        if path in weights:
            raise ConfigError(f"{path} is given twice; give it once, with the weight that is meant, such as {path}=2")
        weights[path] = 1.0 if weight is None else weight
    return weights


def weighed(word: str) -> tuple[str, float | None]:
    """Return the path and the weight of a word such as `chats.jsonl=0.5`, None where it has none."""
    path, _, number = word.rpartition("=")
    if path and not os.path.lexists(word):
        try:
            return path, float(number)
        except ValueError:
            pass
    return word, None


def _is_mapping(option: "Attribute[Any]") -> bool:
    """Whether an option is a mapping and nothing else."""
    return mapping_of(members(option.type)[:1]) is not None


def _metavar(option: "Attribute[Any]") -> str:
    kind = members(option.type)[0]
    if _is_mapping(option):
        return "A=B"
    return "A,B" if is_list(kind) else METAVARS.get(kind, "NAME")


def _help(option: "Attribute[Any]") -> str:
    default = "required" if option.default is NOTHING else f"default {show(option.default)}"
    return f"{option.metadata['help']} ({expected(option)}; {default})".replace("%", "%%")
