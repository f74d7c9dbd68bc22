"""Field mappings: which names a row has afterwards, and what is refused."""

from typing import Any

import pytest

from mlx_trainer.data.samples.conversation import Conversation, DataError, Message, RowError
from mlx_trainer.data.samples.formats import FORMATS, detect_format
from mlx_trainer.data.sources.mapping import FieldMapping, rename

TALK = {"dialog": [{"speaker": "human", "utterance": "2+2?"}, {"speaker": "bot", "utterance": "4"}]}
TALK_MAPPING = FieldMapping(
    {"messages": "dialog", "role": "speaker", "content": "utterance"}, {"human": "user", "bot": "assistant"}
)


@pytest.mark.parametrize(
    ("fields", "row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "1", "a": "2", "i": 3}, {"prompt": "1", "completion": "2", "i": 3}),
        ({"prompt": "data.q"}, {"data": {"q": "2+2?", "a": "4"}}, {"data": {"q": "2+2?", "a": "4"}, "prompt": "2+2?"}),
        ({"prompt": "data.q"}, {"data.q": "flat", "data": {"q": "deep"}}, {"data": {"q": "deep"}, "prompt": "flat"}),
        ({"prompt": "q"}, {"prompt": "old", "q": "new"}, {"prompt": "new"}),
        ({"prompt": "a", "a": "prompt"}, {"prompt": 1, "a": 2}, {"prompt": 2, "a": 1}),
        ({"prompt": "q", "completion": "q"}, {"q": "both"}, {"prompt": "both", "completion": "both"}),
        ({"prompt": "q"}, {"prompt": "stays"}, {"prompt": "stays"}),
        ({"prompt": "q.r.s"}, {"q": {"r": "text"}}, {"q": {"r": "text"}}),
        ({"prompt": "q"}, {"q": None}, {"prompt": None}),
        ({"text": "content"}, {"content": "a"}, {"text": "a"}),
        ({"content": "body"}, {"body": "a"}, {"content": "a"}),
    ],
)  # fmt: skip
def test_renamed_rows(fields: dict[str, str], row: dict[str, Any], expected: dict[str, Any]) -> None:
    """A row has the format's names, the mapped value before one it had; what is not there changes nothing."""
    before = repr(row)
    assert FieldMapping(fields).apply(row) == rename(row, fields) == expected
    assert repr(row) == before


def test_messages() -> None:
    """Keys and roles are renamed inside each message, and what is no message is left to the format's error."""
    row = TALK_MAPPING.apply(TALK)
    assert FORMATS[detect_format(row)].parse(row) == Conversation(
        (Message("user", "2+2?", 0), Message("assistant", "4"))
    )
    odd = {"messages": ["text", {"role": 3, "content": "x"}, {"speaker": "human", "role": "other"}, {"role": "judge"}]}
    assert TALK_MAPPING.apply(odd) == {
        "messages": ["text", {"role": 3, "content": "x"}, {"role": "user"}, {"role": "judge"}]
    }
    assert TALK_MAPPING.apply({"dialog": "no list"}) == {"messages": "no list"}


def test_sharegpt_and_roles_alone() -> None:
    """ShareGPT's names are mapped alike, and roles need no fields."""
    mapping = FieldMapping(
        {"conversations": "turns", "from": "who", "value": "data.text"}, {"me": "human", "ai": "gpt"}
    )
    turns = [{"who": "me", "data": {"text": "2+2?"}}, {"who": "ai", "data": {"text": "4"}}]
    row = mapping.apply({"turns": turns})
    assert detect_format(row) == "ShareGPT"
    assert [(turn["from"], turn["value"]) for turn in row["conversations"]] == [("human", "2+2?"), ("gpt", "4")]  # type: ignore[attr-defined]
    only_roles = FieldMapping(roles={"model": "assistant"})
    assert only_roles.apply({"messages": [{"role": "model"}]}) == {"messages": [{"role": "assistant"}]}


def test_a_row_without_the_mapped_keys_tells_those_it_has() -> None:
    """The error of a row that the mapping does not fit names the row's own keys."""
    with pytest.raises(RowError, match="unknown format: the keys are 'quest'"):
        detect_format(FieldMapping({"prompt": "question"}).apply({"quest": "2+2?"}))


def test_a_mapping_is_a_value() -> None:
    """Order does not matter to equality, hash and text; names do; none leaves the very row."""
    one, same = FieldMapping({"a": "b", "c": "d"}), FieldMapping({"c": "d", "a": "b"})
    assert (one, hash(one), one.canonical) == (same, hash(same), same.canonical)
    others = [FieldMapping(), FieldMapping({"a": "b"}), FieldMapping(roles={"a": "b", "c": "d"}), TALK_MAPPING]
    assert len({one.canonical, *(other.canonical for other in others)}) == 5
    assert FieldMapping().apply(TALK) is TALK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": 3}, r"^3 is no name\. Names of fields and roles are text"),
        ({"": "question"}, r"^'' is no name"),
        (["prompt"], r"^A mapping of names is needed, such as \{'prompt': 'question'\}, not \['prompt'\]\.$"),
    ],
)
def test_mappings_that_are_none(fields: Any, message: str) -> None:
    """What is not text is refused by name, for fields and roles."""
    for arguments in ({"fields": fields}, {"roles": fields}):
        with pytest.raises(DataError, match=message):
            FieldMapping(**arguments)
