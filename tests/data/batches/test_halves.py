"""Halves of a batch: every row in one of them, with all that is trained of it; their shapes follow from its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_trainer.data.batches.halves import balanced, real_cells
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from tests.data.batches.test_batch import rows_and_shape


def row(number: int, length: int, trained: int) -> TokenRow:
    """Distinct ids, of which the last `trained` are trained."""
    return TokenRow(
        f"x:{number}", np.arange(length, dtype=np.int32) + 1_000 * number, np.arange(length) >= length - trained
    )


PADDING = 0, 99
"""No row of `rows_and_shape` has these ids."""


def learned(batch: UnpaddedBatch) -> Iterator[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]:
    """Each row's ids, and what is predicted at which of its places."""
    targets = {p: t for p, t, w in zip(*map(list, (batch.predicting, batch.targets, batch.weights)), strict=True) if w}
    for positions, real in zip(batch.grid, real_cells(batch), strict=True):
        own = [p for p in positions[real].tolist() if batch.input_ids[p] not in PADDING]
        if own:
            yield (
                tuple(batch.input_ids[own].tolist()),
                tuple((i, targets[p]) for i, p in enumerate(own) if p in targets),
            )


def check(batch: UnpaddedBatch) -> None:
    """The grid's inverse, the predictions' inverse, and padding where the others rely on it."""
    flat, last = batch.grid.reshape(-1), len(batch.input_ids) - 1
    assert {flat[cell] - p for p, cell in enumerate(batch.cells) if flat[cell] != last} <= {0}
    assert len(real_cells(batch)) == len(batch.grid)
    room = len(batch.targets)
    for p, place in enumerate(batch.predictions.tolist()):
        assert place == room - 1 or batch.predicting[place] == p
    assert batch.weights[-1] == 0
    assert batch.predictions[batch.predicting[batch.weights > 0]].tolist() == list(range(int(batch.weights.sum())))
    assert {batch.grid.dtype, batch.cells.dtype, batch.predicting.dtype, batch.targets.dtype} == {np.dtype(np.int32)}


@given(rows_and_shape(), st.integers(1, 12))
@settings(suppress_health_check=list(HealthCheck))
def test_every_row_is_in_one_half(drawn: tuple[list[TokenRow], Shape], predictions: int) -> None:
    """With its predictions; a single cell of padding may count as a token of its row that nothing trains."""
    rows, shape = drawn
    batch = collate_unpadded(rows, shape, min(predictions, shape.tokens), pad_id=99)
    halves = batch.halves()
    assert [len(half.grid) for half in halves] in ([shape.rows], [-(-shape.rows // 2), shape.rows // 2])
    for half in halves:
        check(half)
    assert Counter(one for half in halves for one in learned(half)) == Counter(learned(batch))
    assert sum(float(half.weights.sum()) for half in halves) == batch.weights.sum()


def classes(count: int, rows: int, spread: int, seed: int) -> Iterator[list[TokenRow]]:
    """Batches of a class of lengths, 80 - `spread` to 79, of which 30 to 60 are trained."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        lengths = random.integers(80 - spread, 80, rows)
        yield [row(i, int(n), int(random.integers(30, 61))) for i, n in enumerate(lengths)]


ROOM = {2: 121, 7: 380, 8: 440, 26: 1300}
"""Predictions of a batch of so many rows: what any may need, and of many rows hardly more than they do."""


@pytest.mark.parametrize("rows", ROOM)
def test_halves_of_a_class_have_one_shape_and_are_balanced(rows: int) -> None:
    """Whatever its rows are; the larger half has hardly more than its share of positions and predictions."""
    shape, shapes = Shape(rows, 80, 79 * rows), Counter[Any]()
    for batch in classes(50, rows, spread=8, seed=rows):
        halves = collate_unpadded(batch, shape, ROOM[rows]).halves()
        assert [half.whole for half in halves] == [(79 * rows, ROOM[rows], rows)] * 2
        shapes[tuple((half.grid.shape, len(half.input_ids), len(half.targets)) for half in halves)] += 1
    assert len(shapes) == 1
    for (own, _), positions, predictions in next(iter(shapes)):
        assert own * 79 < positions <= own * 79 + 20
        assert 0 <= predictions - ROOM[rows] * own / rows <= 8


def test_rows_are_dealt_by_length_and_by_what_is_trained() -> None:
    """Pairs of nearly equal length, the one that is trained more to the half that has less so far; one is the mean."""
    tokens, trained = np.array([50, 49, 40, 40, 30, 30, 20]), np.array([10, 40, 30, 5, 20, 19, 1])
    first, second = balanced(tokens, trained)
    assert (first.tolist(), second.tolist()) == ([0, 2, 4, 5], [1, 3, 6])


def alone(batch: Any) -> bool:
    """Whether it is no halves."""
    return batch.halves() == [batch]


def test_what_cannot_be_halved_stays_as_it_is() -> None:
    """A single row, rows that share a prefix, and rows so different that a half has no room for its own."""
    single, unlike = [row(0, 9, 4)], [row(i, n, 1) for i, n in enumerate((80, 3, 3, 3))]
    prefix = [TokenRow(f"x:{i}", np.array([1, 2, 3, 4 + i], np.int32), np.arange(4) == 3) for i in range(4)]
    assert alone(collate_unpadded(single, Shape(1, 9, 9), 5))
    assert alone(collate_unpadded(prefix, Shape(4, 2, 10, 2, 1), 5))
    assert alone(collate_unpadded(unlike, Shape(4, 80, 96), 9))
    assert alone(collate(single, Shape(1, 9, 9)))


@pytest.mark.parametrize("lengths", [(3, 5), (2, 4, 5), (6, 1, 2, 3)])
def test_padded_halves_are_the_first_and_the_last_rows(lengths: Sequence[int]) -> None:
    """All arrays alike, and nothing is lost."""
    batch = collate([row(i, n, n - 1) for i, n in enumerate(lengths)], Shape(len(lengths), 6, 0))
    first, last = batch.halves()
    assert len(first.labels) - len(last.labels) == len(lengths) % 2
    for name in ("input_ids", "attention_mask", "labels"):
        both = np.concatenate([getattr(first, name), getattr(last, name)])
        assert both.tolist() == getattr(batch, name).tolist()
