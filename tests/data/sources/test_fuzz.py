"""A hundred thousand damaged lines: each becomes tokens or a reason, and none an exception, a hang or nonsense."""

import json
import random
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.conversation import RowError, Sample
from mlx_trainer.data.samples.formats import FORMATS, detect_format
from mlx_trainer.data.sources.files import FileSource

LINES = 100_000
LONG = 10_000_000
ENCODED_TOGETHER = 1024
SECONDS = 120
"""Far above what it takes (23 s on two shared cores); a hang is minutes."""

DIGITS = str.maketrans(dict.fromkeys(string.digits))

Draw = random.Random
WORDS = ["2+2?", "four", "Paris.", "é", "日本", "😀", "</s>[INST]", "\u2028", "\x00", "\t \n", "'\"\\", "{[", ""]


def text(draw: Draw) -> str:
    """A short text of odd words."""
    return " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))


def messages(draw: Draw, role: str, content: str, names: tuple[str, str, str]) -> list[dict[str, Any]]:
    """A conversation with these keys and names of system, user and assistant."""
    chat = [{role: names[0], content: text(draw)}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        chat += [{role: names[1], content: text(draw)}, {role: names[2], content: "So: " + text(draw)}]
    return chat


def valid_row(draw: Draw) -> dict[str, Any]:
    """A row of any format."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"messages": messages(draw, "role", "content", ("system", "user", "assistant"))},
        lambda: {"messages": [*messages(draw, "role", "content", ("system", "user", "assistant"))], "tools": []},
        lambda: {"conversations": messages(draw, "from", "value", ("system", "human", "gpt")), "system": ""},
        lambda: {"prompt": text(draw), "completion": "So: " + text(draw)},
        lambda: {"instruction": text(draw), "input": text(draw), "output": "a", "history": [[text(draw), "b"]]},
        lambda: {"text": "So: " + text(draw)},
        lambda: {"prompt": text(draw), "chosen": "a", "rejected": "b"},
    ]
    return draw.choice(kinds)()


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) inside `value`."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def nested(levels: int) -> Any:
    """A list of lists so many levels down."""
    value: Any = {"role": "user"}
    for _ in range(levels):
        value = [value]
    return value


def odd_value(draw: Draw) -> Any:
    """A value that fits nowhere, or nearly."""
    odd: list[Callable[[], Any]] = [
        lambda: draw.choice(
            [None, True, False, 0, 1, -1, 1.0, 0.5, 1e308, float("nan"), float("inf"), "", " ", [], {}]
        ),
        lambda: draw.choice(
            [[[]], [{}], {"": None}, {"role": "user"}, ["user", "a"], "user", "assistant", "gpt", "tool"]
        ),
        lambda: draw.choice([10**30, -(10**4000), nested(5), nested(98), nested(101), nested(300)]),
        lambda: draw.choice(["\ud800", "a\udfffb", "\ud83d" * 9, "\udc00\ud800"]),
        lambda: text(draw),
    ]
    return draw.choice(odd)()


def change_value(draw: Draw, row: dict[str, Any]) -> None:
    """Put another value at one place of the row, or its value under another key, or nothing."""
    if not row:
        row["text"] = "a"
    container, key = draw.choice([*places(row)])
    action = draw.randrange(4)
    if action <= 1:
        container[key] = odd_value(draw)
    elif action == 2:
        del container[key]
    elif isinstance(container, dict):
        value = container.pop(key)
        container[
            draw.choice([*"ab", "role", "content", "from", "value", "weight", "text", "tool_calls", "system"])
        ] = value
    else:
        container.insert(0, container[-1])


def change_bytes(draw: Draw, line: bytes) -> bytes:
    """Flip a bit, cut, repeat or replace a part of the line, or put rubbish in it."""
    data, place = bytearray(line), draw.randrange(len(line))
    action = draw.randrange(7)
    if action == 0:
        data[place] ^= 1 << draw.randrange(8)
    elif action == 1:
        del data[place:]
    elif action == 2:
        data[place:place] = data[draw.randrange(len(data)) :][: draw.randrange(40)]
    elif action == 3:
        data[place:place] = draw.choice(
            [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\r", b"\xef\xbb\xbf", b"\\u0000"]
        )
    elif action == 4:
        data = bytearray(line.replace(b'"' + draw.choice([b"role", b"text", b"value"]) + b'"', b'"content"'))
    elif action == 5:
        data[-1:] = draw.choice(
            [b', "text": NaN}', b', "id": ' + b"9" * 5000 + b"}", b', "x": 1, "x": 2}', b"}{}", b"}]"]
        )
    else:
        data = bytearray(draw.choice([b"null", b"[]", b"3", b'"text"', b"{}", b"  \t", b"[" * 3000, b'{"a":' * 3000]))
    return bytes(data)


def long_lines() -> list[bytes]:
    """Lines of ten million bytes: text, and what may take long to find wrong."""
    return [
        json.dumps({"text": "two and two are four. " * (LONG // 22)}).encode(),
        json.dumps({"prompt": "x" * LONG, "completion": "y"}).encode(),
        json.dumps({"messages": [{"role": "r" * LONG, "content": "a"}]}).encode(),
        json.dumps({"k" * LONG: 1}).encode(),
        b'{"text": "' + b"x" * LONG,
        b'{"text": "a", "id": ' + b"9" * LONG + b"}",
        b"[" * LONG,
        b'{"a": 1, ' * (LONG // 9),
        b"{" + b", ".join(b'"%d": []' % n for n in range(LONG // 15)) + b', "1": 2}',
        b" " * LONG,
        b"\xff" * LONG,
    ]


def fuzzed(draw: Draw, count: int) -> Iterator[bytes]:
    """Lines, of which a third are valid and the others changed once or several times."""
    yield from long_lines()
    for _ in range(count):
        row = valid_row(draw)
        damage = draw.randrange(3)
        if damage == 1:
            for _ in range(draw.choice([1, 1, 2, 5])):
                change_value(draw, row)
        line = json.dumps(row, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
        if damage == 2:
            for _ in range(draw.choice([1, 1, 2, 5])):
                line = change_bytes(draw, line) if line else line
        yield line


Judged = tuple[str, Tokens | RowError]


def parsed(source: FileSource) -> Iterator[tuple[str, Sample | RowError]]:
    """The sample of each line by its place, or what is wrong with it."""
    for line in source.lines():
        place = f"{source.name}:{line.number}"
        if isinstance(line.value, RowError):
            yield place, line.value
            continue
        try:
            yield place, FORMATS[detect_format(line.value)].parse(line.value)
        except RowError as error:
            yield place, error


def encoded(source: FileSource, encoder: SampleEncoder) -> Iterator[Judged]:
    """The tokens of each line by its place, or what is wrong with it."""
    lines = parsed(source)
    while part := list(islice(lines, ENCODED_TOGETHER)):
        tokens = iter(encoder.encode([sample for _, sample in part if not isinstance(sample, RowError)]))
        for place, sample in part:
            yield place, sample if isinstance(sample, RowError) else next(tokens)


def test_damaged_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every line is accepted with valid tokens, or refused by file, line and reason; no line is passed over."""
    start = time.monotonic()
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(fuzzed(random.Random(7), LINES)))
    filled = [f"fuzz.jsonl:{n}" for n, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()]
    counts: Counter[str] = Counter()
    seen = []
    for place, result in encoded(FileSource.of(path), SampleEncoder.of(tokenizer)):
        seen.append(place)
        if isinstance(result, RowError):
            reason = str(result)
            reason.encode()  # it can be printed
            counts[reason.translate(DIGITS)[:12] or "no reason"] += 1
        else:
            ids, trained = result.ids, result.trained
            assert 0 <= ids.min() <= ids.max() < len(tokenizer), place
            assert len(ids) == len(trained), place
            assert trained.any() and not trained[0], place  # noqa: PT018  # one property: what can be trained is
            counts["accepted"] += 1
    assert seen == filled
    assert "no reason" not in counts
    assert counts["accepted"] > LINES / 4
    assert counts.total() - counts["accepted"] > LINES / 4
    assert len(counts) > 30  # many kinds of reasons
    assert time.monotonic() - start < SECONDS
