"""Regular expressions that stand for layers, with PEFT's meaning."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from mlx_trainer.config.error import ConfigError

T = TypeVar("T")


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """Return the value of the first pattern that the last components of the dotted `path` match, else `default`.

    >>> by_pattern({r"\\d+\\.mlp\\.down_proj": 4, "down_proj": 8}, "layers.11.mlp.down_proj", 16)
    4
    """
    return next((value for pattern, value in patterns.items() if matches(pattern, path)), default)


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` is, or as a regular expression matches, the last components of the dotted `path`."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def check_expressions(expressions: Mapping[str, Iterable[str]]) -> None:
    """Raise ConfigError naming the option for text that is no regular expression."""
    for name, texts in expressions.items():
        for text in texts:
            try:
                re.compile(text)
            except re.error as error:
                raise ConfigError(f"lora.{name} has {text!r}, which is no regular expression: {error}") from error
