"""Which rows begin alike."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.data.store import prefixes
from mlx_trainer.data.store.prefixes import LEAST, STEP, TOGETHER, find_prefixes
from mlx_trainer.data.store.store import MappedArray
from tests.data.stores import write_store


def found(rows: list[list[int]], limits: list[int] | None = None) -> list[tuple[int, int]]:
    """(family, prefix) of each row."""
    ids = MappedArray(None, np.array([token for row in rows for token in row], np.uint16))
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths], dtype=np.int64)[:-1]
    return find_prefixes(ids, starts, np.array(limits or lengths, np.int32)).tolist()


def tokens(seed: int, count: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, 500, count).tolist()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 90), st.integers(0, 60)), max_size=12), st.integers(1, 3))
def test_a_family_begins_alike(drawn: list[tuple[int, int, int]], few: int) -> None:
    """Rows of a family have the prefix in common, within their limits, and each shares with another where any does."""
    heads = [tokens(seed, 90) for seed in range(few)]
    rows = [heads[head % few][:shared] + tokens(1000 + i, own) for i, (head, shared, own) in enumerate(drawn)]
    limits = [max(len(row) - 1 - i % 3, 0) for i, row in enumerate(rows)]
    result = found(rows, limits)
    members: dict[int, list[int]] = {}
    for i, (family, prefix) in enumerate(result):
        assert prefix <= limits[i]
        assert prefix == 0 or prefix >= LEAST
        if prefix:
            members.setdefault(family, []).append(i)
    for family in members.values():
        assert len({(result[i][1], tuple(rows[i][: result[i][1]])) for i in family}) == 1
    for i, row in enumerate(rows):
        could = [n for n in range(LEAST, limits[i] + 1, STEP) for k in range(len(rows)) if k != i
                 and limits[k] >= n and rows[k][:n] == row[:n]]  # fmt: skip
        assert (result[i][1] > 0) == bool(could)


def test_what_saves_more_is_chosen() -> None:
    """Many rows with a system prompt of 64 share it; two of them that share 160 tokens are a family of their own."""
    system, question = tokens(0, 64), tokens(1, 96)
    rows = [system + tokens(10 + i, 40) for i in range(20)]
    rows += [system + question + tokens(50 + i, 20) for i in range(2)]
    result = found(rows)
    assert [prefix for _, prefix in result] == [64] * 20 + [160] * 2
    assert len({family for family, _ in result[:20]}) == 1
    assert result[20] == result[21] != result[0]
    assert 64 * (1 - 1 / TOGETHER) < 160 / 2


def test_large_families_stay_together() -> None:
    """A few tokens more that half of a family has in common are not worth it; those that nearly all have are."""
    system, common = tokens(0, 96), tokens(1, 16)
    half = [system + (common if i % 2 else []) + tokens(10 + i, 40) for i in range(40)]
    nearly = [system + (common if i else []) + tokens(10 + i, 40) for i in range(40)]
    assert [prefix for _, prefix in found(half)] == [96] * 40
    assert [prefix for _, prefix in found(nearly)] == [96] + [112] * 39


def test_limits_bound_the_prefix() -> None:
    """Rows share no more than each of them may."""
    head = tokens(0, 100)
    result = found([head + tokens(1, 9), head + tokens(2, 9)], [95, 47])
    assert [prefix for _, prefix in result] == [32, 32]


def test_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests are the same, however many rows are read at once."""
    rows = [tokens(i % 3, 80) + tokens(10 + i, 5) for i in range(9)]
    whole = found(rows)
    monkeypatch.setattr(prefixes, "ROWS_AT_ONCE", 2)
    assert found(rows) == whole
    assert {prefix for _, prefix in whole} == {80}


def test_a_store_knows_them(tmp_path: Path) -> None:
    """A store's columns are those of its rows, up to the token that predicts the first trained one."""
    head = tokens(0, 70)
    rows = [(head + tokens(i, 9), [False] * first + [True] * (79 - first)) for i, first in enumerate([79, 70, 49, 33])]
    store = write_store(tmp_path, rows)
    assert store.column("first").tolist() == [79, 70, 49, 33]
    assert store.column("prefix").tolist() == [64, 64, 48, 32] or store.column("prefix").tolist() == [48, 48, 48, 32]
