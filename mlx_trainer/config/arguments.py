"""The schema as command-line options: `--section.key VALUE`, with defaults, ranges and help from the schema."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

from attrs import NOTHING, Attribute, fields

from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.keys import from_text, keys, sections
from mlx_trainer.config.option import expected, is_list, members, show

METAVARS: Mapping[object, str] = {bool: "true|false", int: "N", float: "X", str: "TEXT"}


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
            group.add_argument(*spellings, dest=key, metavar=_metavar(option), help=_help(option))


def overrides(given: Mapping[str, Any]) -> dict[str, object]:
    """Return the keys of the schema among what was given, each as its option's type."""
    return {key: from_text(text, keys()[key]) for key, text in given.items() if key in keys()}


def _metavar(option: "Attribute[Any]") -> str:
    kind = members(option.type)[0]
    return "A,B" if is_list(kind) else METAVARS.get(kind, "NAME")


def _help(option: "Attribute[Any]") -> str:
    default = "required" if option.default is NOTHING else f"default {show(option.default)}"
    return f"{option.metadata['help']} ({expected(option)}; {default})".replace("%", "%%")
