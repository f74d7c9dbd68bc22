"""The token store: what is written is read, what is not whole is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_trainer.data import DataError
from mlx_trainer.data.store import store as store_module
from mlx_trainer.data.store.rows import Rows
from mlx_trainer.data.store.store import FACTS, TokenStore
from tests.data.stores import Given, distinct_rows, write_store

ROWS = st.lists(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 70_000), min_size=n, max_size=n), st.lists(st.booleans(), min_size=n, max_size=n)
        )
    ),
    max_size=30,
)


@given(ROWS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_rows_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[Given]) -> None:
    """Ids, masks and sources are read as they were written, in any order, and the facts are those of the rows."""
    store = write_store(tmp_path_factory.mktemp("store"), rows)
    read = Rows.of([store])
    for i in reversed(range(len(rows))):
        assert read[i].source == f"chats.jsonl:{i + 1}"
        assert read[i].ids.tolist() == list(rows[i][0])
        assert read[i].trained.tolist() == [False, *rows[i][1][1:]]  # nothing predicts a row's first token
    assert read.lengths.tolist() == [len(ids) for ids, _ in rows]
    assert read.column("trained").tolist() == [sum(trained[1:]) for _, trained in rows]
    facts = store.facts
    assert (facts.rows, facts.total, facts.tokens) == (len(rows), len(rows), sum(len(ids) for ids, _ in rows))
    assert facts.largest_id == max((id for ids, _ in rows for id in ids), default=0)


@pytest.mark.parametrize(("largest_id", "size"), [(65_535, 2), (65_536, 4)])
def test_ids_are_kept_small(tmp_path: Path, largest_id: int, size: int) -> None:
    """Ids take two bytes where the vocabulary allows it, and come back whole."""
    store = write_store(tmp_path, [([0, largest_id], [False, True])], largest_id=largest_id)
    assert (tmp_path / "ids.bin").stat().st_size == 2 * size
    assert store.row(0).ids.tolist() == [0, largest_id]


def test_equal_rows_have_equal_digests(tmp_path: Path) -> None:
    """The digest is that of ids and mask alone."""
    rows = [([5, 6, 7], [False, True, True]), ([5, 6, 7], [False, False, True]), ([5, 6, 8], [False, True, True])]
    digests = write_store(tmp_path, [*rows, rows[0]]).column("digest").tolist()
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("damage", ["cut", "longer", "missing", "facts", "format"])
@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "rows.bin"])
def test_what_is_not_whole_is_not_there(tmp_path: Path, name: str, damage: str) -> None:
    """A store with a file that is missing or has another size, or without its facts, is none."""
    write_store(tmp_path, distinct_rows([5, 9]))
    path, facts = tmp_path / name, tmp_path / FACTS
    if damage == "missing":
        path.unlink()
    elif damage == "facts":
        facts.write_text(facts.read_text()[:-9])
    elif damage == "format":
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 0}))
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else path.read_bytes() + b"\0")
    assert TokenStore.open(tmp_path, "chats.jsonl") is None


def test_damaged_tokens_are_refused(tmp_path: Path) -> None:
    """An id beyond what was written, or a mask that counts otherwise, raises where the row is read."""
    for name, value in (("ids.bin", b"\xff\xff\xff\x00"), ("trained.bin", b"\0")):
        folder = tmp_path / name
        write_store(folder, distinct_rows([5, 9]))
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: -len(value)] + value)
        store = TokenStore.open(folder, "chats.jsonl")
        assert store is not None
        assert len(store.row(0)) == 5
        with pytest.raises(DataError, match=r"is damaged at chats\.jsonl:2\. Remove it; it will be made again"):
            store.row(1)


def test_what_was_read_is_handed_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay the same when the pages that they were read from are given back to the system after each."""
    monkeypatch.setattr(store_module, "READ_AT_ONCE", 1)
    rows = distinct_rows([3, 7, 5, 11])
    store = write_store(tmp_path, rows)
    for _ in range(3):
        assert [store.row(i).ids.tolist() for i in range(4)] == [list(ids) for ids, _ in rows]


def test_rows_of_several_stores(tmp_path: Path) -> None:
    """Rows of stores are one sequence; numbers count all rows of all sources, and any part can be taken."""
    first = write_store(tmp_path / "a", distinct_rows([3, 4]), "a.jsonl")
    second = write_store(tmp_path / "b", distinct_rows([5, 6, 7]), "b.jsonl")
    rows = Rows.of([first, second])
    assert [row.source for row in rows] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]
    assert rows.numbers.tolist() == [0, 1, 2, 3, 4]
    some = rows.take(np.array([4, 0]))
    assert [row.source for row in some] == ["b.jsonl:3", "a.jsonl:1"]
    assert (some.lengths.tolist(), some.numbers.tolist()) == ([7, 3], [4, 0])
    assert [row.source for row in rows[1:3]] == ["a.jsonl:2", "b.jsonl:1"]
    assert [len(row) for row in rows[-1:]] == [7]
    assert len(Rows.of([])) == len(Rows.of([]).lengths) == 0
