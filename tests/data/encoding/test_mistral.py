"""The Mistral encoding against mistral-common, which is the ground truth."""

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.formats import parse_messages
from tests.data.ground_truth import answer_ids, expected
from tests.data.tokenizers_for_tests import (
    MISTRAL_TEMPLATE,
    byte_level_mistral,
    mistral_tokenizer,
)
from tests.strategies import CONTROL_LOOK_ALIKES, chats

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "and of </s>[INST] Italy?"},
    {"role": "assistant", "content": "Rome.  "},
]


def encode(encoder: SampleEncoder, *rows: dict[str, Any]) -> list[Tokens]:
    """Our tokens of `rows`, encoded together."""
    encoded = encoder.encode([parse_messages(row) for row in rows])
    good = [tokens for tokens in encoded if isinstance(tokens, Tokens)]
    assert len(good) == len(encoded), [error for error in encoded if not isinstance(error, Tokens)]
    return good


def runs(tokens: Tokens) -> list[list[int]]:
    """The ids of each stretch of trained positions."""
    edges = np.flatnonzero(np.diff(tokens.trained, prepend=False, append=False)).tolist()
    return [tokens.ids[a:b].tolist() for a, b in zip(edges[::2], edges[1::2], strict=True)]


def traits(row: dict[str, Any]) -> list[str]:
    """What a row has, to count how varied the drawn ones are."""
    messages = row["messages"]
    users = [m for m in messages if m["role"] == "user"]
    texts = [m["content"] for m in messages if m.get("content")]
    has = {
        "tools": "tools" in row,
        "calls": any("tool_calls" in m for m in messages),
        "results": any(m["role"] == "tool" for m in messages),
        "a question after a result": any(a["role"] == "tool" and b["role"] == "user" for a, b in pairwise(messages)),
        "a call at the end": "tool_calls" in messages[-1],
        "system": messages[0]["role"] == "system",
        "several turns": len(users) > 1,
        "weight 0": any(m.get("weight") == 0 for m in messages),
        "an empty question": any(not m["content"] for m in users),
        "trailing blanks": any(text.endswith(" ") for text in texts),
        "control tokens in text": any(look in text for look in CONTROL_LOOK_ALIKES for text in texts),
        "letters beyond ASCII": not all(text.isascii() for text in texts),
    }
    return [name for name, present in has.items() if present]


@pytest.mark.parametrize(("always_prepend", "batches"), [(False, 100), (True, 10)])
def test_equals_mistral_common(always_prepend: bool, batches: int) -> None:
    """On 10,000 drawn rows, in batches of 100, ids and trained ids equal mistral-common's; no row is left out."""
    encoder = SampleEncoder.of(mistral_tokenizer(always_prepend=always_prepend))
    drawn: Counter[str] = Counter()

    @settings(max_examples=batches, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(chats(100))
    def compare(rows: list[dict[str, Any]]) -> None:
        for row, tokens in zip(rows, encode(encoder, *rows), strict=True):
            drawn.update(["rows", *traits(row)])
            ids, trained = expected(row)
            assert tokens.ids.tolist() == ids, row
            assert tokens.ids[tokens.trained].tolist() == trained, row

    compare()
    assert drawn["rows"] >= 100 * batches
    assert {name: count for name, count in drawn.items() if count < 0.05 * drawn["rows"]} == {}
    assert len(drawn) == 13


@given(rows=chats(20))
@settings(max_examples=25, deadline=None, database=None)
def test_trained_are_exactly_the_answers(rows: list[dict[str, Any]]) -> None:
    """Every trained run is an answer's or its calls' ids and `</s>`, in order; no other position is trained."""
    for row, tokens in zip(rows, encode(sentencepiece_encoder(), *rows), strict=True):
        answers = [m for m in row["messages"] if m["role"] == "assistant"]
        assert runs(tokens) == [answer_ids(m) for m in answers if m.get("weight", 1)]


@given(rows=chats(20))
@settings(max_examples=15, deadline=None, database=None)
def test_prompts_tools_and_results_are_never_trained(rows: list[dict[str, Any]]) -> None:
    """From each control token that opens a prompt, definitions or a result to the one that ends it, none is trained."""
    for row, tokens in zip(rows, encode(sentencepiece_encoder(), *rows), strict=True):
        ids, trained = tokens.ids.tolist(), tokens.trained.tolist()
        for begin, end in ((3, 4), (6, 7), (8, 9)):
            starts = [i for i, id in enumerate(ids) if id == begin]
            stops = [i for i, id in enumerate(ids) if id == end]
            assert len(starts) == len(stops)
            assert not any(any(trained[a : b + 1]) for a, b in zip(starts, stops, strict=True))
        assert not trained[0]
        assert len([id for id in ids if id == 6]) == ("tools" in row)


@cache
def sentencepiece_encoder() -> SampleEncoder:
    """The encoder of Mistral's own vocabulary."""
    return SampleEncoder.of(mistral_tokenizer())


def test_trained_tokens_of_a_chat() -> None:
    """Trained are each answer and its `</s>`; the system text stands before the last question, look-alikes are text."""
    tokenizer = mistral_tokenizer()
    (tokens,) = encode(SampleEncoder.of(tokenizer), {"messages": CHAT})
    assert tokens.ids.tolist() == expected({"messages": CHAT})[0]
    assert tokenizer.decode(tokens.ids[tokens.trained]) == " Paris.</s> Rome.</s>"
    assert tokenizer.decode(tokens.ids) == (
        "<s>[INST] capital of France?[/INST] Paris.</s>[INST] Be brief.\n\nand of </s>[INST] Italy?[/INST] Rome.</s>"
    )
    assert [int((tokens.ids == id).sum()) for id in (1, 2, 3, 4)] == [1, 2, 2, 2]


def test_weight_zero_is_not_trained() -> None:
    """An answer of weight 0 keeps its ids and loses its labels, its `</s>` included."""
    tokenizer = mistral_tokenizer()
    weighted: list[dict[str, Any]] = [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]
    (tokens,) = encode(SampleEncoder.of(tokenizer), {"messages": weighted})
    assert tokens.ids.tolist() == expected({"messages": CHAT})[0]
    assert tokenizer.decode(tokens.ids[tokens.trained]) == " Rome.</s>"


@pytest.mark.parametrize("template", [None, MISTRAL_TEMPLATE])
def test_byte_level_equals_its_template(template: str | None) -> None:
    """With byte-level BPE the ids are those of the template's string, where no text looks like a control token."""
    tokenizer = byte_level_mistral(template)
    messages = [CHAT[1], CHAT[2], {"role": "user", "content": " hello"}, {"role": "assistant", "content": "four"}]
    expected = "<s>[INST] capital of France?[/INST] Paris.</s>[INST]  hello[/INST] four</s>"
    (tokens,) = encode(SampleEncoder.of(tokenizer), {"messages": messages})
    assert tokens.ids.tolist() == tokenizer.encode(expected, add_special_tokens=False)
    assert tokenizer.decode(tokens.ids) == expected


def test_template_without_blanks_decides() -> None:
    """A Mistral template that writes no blank after its control tokens is followed."""
    tokenizer = byte_level_mistral(MISTRAL_TEMPLATE.replace("[INST] ", "[INST]").replace("' ' + ", ""))
    (tokens,) = encode(SampleEncoder.of(tokenizer), {"messages": CHAT[1:3]})
    assert tokenizer.decode(tokens.ids) == "<s>[INST]capital of France?[/INST]Paris.</s>"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@settings(max_examples=100, deadline=None, database=None)
def test_no_text_becomes_a_control_token(text: str) -> None:
    """Whatever a question says, the row holds exactly the four control tokens of its one turn."""
    encoder = byte_level_encoder()
    messages = [{"role": "user", "content": f"{text}</s>[INST]{text}<s>"}, {"role": "assistant", "content": "[/INST]"}]
    (tokens,) = encode(encoder, {"messages": messages})
    assert sorted(id for id in tokens.ids.tolist() if id < 5) == [1, 2, 3, 4]


@cache
def byte_level_encoder() -> SampleEncoder:
    """The encoder of byte-level BPE with Mistral's control tokens."""
    return SampleEncoder.of(byte_level_mistral())
