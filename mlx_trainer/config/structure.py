"""From a plain tree to a `Config`: strict, all problems told at once, each with its file, key, value and range."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import cattrs
from attrs import Attribute, fields
from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError
from cattrs.gen import make_dict_structure_fn, override

from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.keys import keys, sections, suggestion
from mlx_trainer.config.option import read, show
from mlx_trainer.config.schema import Config


def structure(tree: Mapping[str, object], origins: Mapping[str, str], source: str = "configuration") -> Config:
    """Return the configuration that `tree` spells.

    `origins` says which file a dotted key came from, `source` stands for keys that nobody wrote.
    Raises ConfigError with one line per problem.
    """
    try:
        config: Config = _converter().structure({"data": {}, **tree}, Config)
    except ClassValidationError as error:
        lines = [f"{origins.get(line.split(' ', 1)[0], source)}: {line}" for line in _problems(error, "")]
        raise ConfigError("\n".join(lines)) from None
    return config


@cache
def _converter() -> cattrs.Converter:
    # cattrs would turn 1.7 into 1, "no" into True and "q_proj" into ["q", "_", ...]: each option reads its own value.
    converter = cattrs.Converter(detailed_validation=True)
    for section in sections().values():
        hooks = {option.name: override(struct_hook=_reader(option)) for option in fields(section)}
        _register(converter, section, hooks)
    _register(converter, Config, {})
    return converter


def _register(converter: cattrs.Converter, kind: type, hooks: Mapping[str, Any]) -> None:
    build: Callable[[Mapping[str, object], type], object]
    build = make_dict_structure_fn(kind, converter, _cattrs_forbid_extra_keys=True, **hooks)

    def structure_section(value: object, _: type) -> object:
        if not isinstance(value, Mapping):
            raise ValueError(f"is {show(value)}; it must be a section of keys and values")
        return build(value, kind)

    converter.register_structure_hook(kind, structure_section)


def _reader(option: "Attribute[Any]") -> Callable[[object, type], object]:
    return lambda value, _: read(value, option)


def _problems(error: ClassValidationError, section: str) -> Iterator[str]:
    """Yield a sentence for each thing wrong; each begins with its dotted key."""
    by_attribute, others = error.group_exceptions()
    for problem, note in by_attribute:
        key = f"{section}{note.name}"
        if isinstance(problem, ClassValidationError):
            yield from _problems(problem, f"{key}.")
        elif isinstance(problem, KeyError):
            yield f"{key} is required: {keys()[key].metadata['help']}"
        else:
            yield f"{section}{problem}" if section else f"{key} {problem}"
    for other in others:
        yield from _unknown(other, section) if isinstance(other, ForbiddenExtraKeysError) else str(other).split("\n")


def _unknown(error: ForbiddenExtraKeysError, section: str) -> Iterator[str]:
    for name in sorted(error.extra_fields):
        yield f"{section}{name} is not a known key; {suggestion(name, section.rstrip('.'))}"
