"""Reading JSONL: one JSON object per line, UTF-8, with the line of everything that is wrong."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from attrs import frozen

from mlx_trainer.data.samples.conversation import RowError
from mlx_trainer.data.samples.fields import JsonObject, json_type

BOM = b"\xef\xbb\xbf"
MAX_LINE = 1 << 28
"""Bytes of the longest line that is read: a file without line ends would be held in memory as a whole."""
MAX_DEPTH = 100
"""Levels of the deepest row that is read; where Python itself gives up depends on who calls, and on its version."""
SHOWN = 60
"""Letters of a text that an error shows of it."""
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


@frozen
class Line:
    """One line that is not blank, or one row of a dataset: its number from 1, and its object or why it has none.

    `size` are the bytes of the line.
    """

    number: int
    value: JsonObject | RowError
    size: int = 0


def split_lines(parts: Iterable[bytes]) -> Iterator[bytes | None]:
    """The lines of `parts`, which may end anywhere, without their ends; None for one that is longer than MAX_LINE."""
    rest: list[bytes] = []  # of a line whose end is not read yet; joined once, as a long one would take quadratic time
    length = 0
    for part in parts:
        first, *others = part.split(b"\n")
        length += len(first)
        rest.append(first)
        if length > MAX_LINE:
            rest.clear()
        if others:
            yield b"".join(rest) if length <= MAX_LINE else None
            yield from others[:-1]
            rest, length = others[-1:], len(others[-1])
    yield b"".join(rest) if length <= MAX_LINE else None


def json_lines(parts: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a file's `parts` that are not blank; a byte order mark before the first is passed over."""
    for number, line in enumerate(split_lines(parts), start=1):
        if line is None:
            yield Line(number, RowError(f"longer than {MAX_LINE:,} bytes; a row is one JSON object on one line"))
            continue
        line = line.removeprefix(BOM) if number == 1 else line
        if line and not line.isspace():
            yield Line(number, parse_line(line), len(line))


def parse_line(line: bytes) -> JsonObject | RowError:
    """The JSON object of one line, or what is wrong with it."""
    try:
        value = DECODER.decode(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON at column {error.colno}: {error.msg}; a row is one JSON object on one line")
    except RowError as error:
        return error
    except ValueError:  # Python converts no integer of more than 4,300 digits, as that takes quadratic time
        return RowError("a number with thousands of digits; write it as text")
    except RecursionError:
        return RowError(TOO_DEEP)
    if not isinstance(value, dict):
        return RowError(f"expected a JSON object, got {json_type(value)}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and deeper(value, MAX_DEPTH):
        return RowError(TOO_DEEP)
    return value


TOO_DEEP = f"JSON nested too deeply to be a row; {MAX_DEPTH} levels are read"


def deeper(value: JsonObject, depth: int) -> bool:
    """Whether `value` has objects and lists below `depth` levels of them."""
    level: list[Any] = [value]
    for _ in range(depth):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
    return bool(level)


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of its pairs; raises RowError where a key comes twice, as which one is meant is anybody's guess."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise RowError(f"duplicate key {key[:SHOWN]!r}; leave one of the two out")
    return found


def refuse_constant(name: str) -> NoReturn:
    """Raise RowError for NaN, Infinity or -Infinity, which Python writes but JSON does not have."""
    raise RowError(f"{name} is no JSON; write null where a value is missing")


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)
