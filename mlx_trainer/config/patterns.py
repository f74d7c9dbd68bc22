"""Regular expressions that stand for layers, with PEFT's meaning."""

import re
from collections.abc import Iterable, Mapping
from math import comb, prod
from typing import TypeVar

from mlx_trainer.config.error import ConfigError

T = TypeVar("T")
LONGEST_PATH = 128
"""Characters of a layer's path: no model's has more."""
LONGEST = 10_000
"""Characters of a pattern, which may list all layers."""
MOST_GROUPS = 100
"""Python reads a group within a group by recursion."""
MOST_WAYS = 4_000_000
COMPILING = 1_000
"""What a pattern costs by itself, in ways."""


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
    """Raise ConfigError naming the option for text that is no regular expression, or could take for ever."""
    for name, texts in expressions.items():
        try:
            check_patterns(texts)
        except ValueError as error:
            raise ConfigError(f"lora.{name} has {error}") from error


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise ValueError, which begins with the pattern, for one that is none, or makes all of them cost too much.

    Python tries one way of matching after the other, and strangers' files hold patterns too. With MOST_WAYS a path
    takes a second at worst; with patterns as people write them, microseconds.
    """
    total = 0
    for pattern in patterns:
        if (total := total + ways(pattern)) > MOST_WAYS:
            raise ValueError(f"{pattern!r:.100}, which could take for ever to match; write names instead")
        try:
            re.compile(pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"{pattern!r:.100}, which is no regular expression: {error!s:.200}") from error


def ways(pattern: str) -> int:
    r"""Return in how many ways a path can be matched at most, more than MOST_WAYS for a group that is repeated.

    Each alternative is one, each `?` doubles them, and k repetitions share the path in `comb(length + k, k)` ways.

    >>> ways(r".*\.(q|v)_proj") - COMPILING, ways("(a+)+") > MOST_WAYS
    (258, True)
    """
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    nested = re.search(r"\)[*+{]|[\s#]", plain)  # with the flag x, blanks and comments may stand before a repetition
    if nested or len(plain) > LONGEST or plain.count("(") > MOST_GROUPS:
        return MOST_WAYS + 1
    repeated = len(re.findall(r"[*+{]", plain))
    doubled = plain.count("?") - plain.count("(?")
    branches = prod(part.count("|") + 1 for part in plain.split(")"))
    return COMPILING + (branches << doubled) * comb(LONGEST_PATH + repeated, repeated)
