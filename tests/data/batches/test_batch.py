"""Batches, padded and unpadded: labels where they belong and nowhere else."""

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_trainer.data.batches.padded import IGNORED, collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.data.store.store import TokenRow


@st.composite
def rows_and_shape(draw: st.DrawFn) -> tuple[list[TokenRow], Shape]:
    """Rows of distinct ids, of one token too, and a shape that holds them, tightly or not."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    rows = []
    for i, n in enumerate(lengths):
        trained = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
        trained[0] = False
        rows.append(TokenRow(f"x:{i}", np.arange(n, dtype=np.int32) + 10 * i + 1, trained))
    shape = Shape(len(rows) + draw(st.integers(0, 2)), max(lengths) + draw(st.integers(0, 3)), 0)
    tokens = min(sum(lengths) + draw(st.integers(1, 5)), shape.rows * shape.length)
    return rows, Shape(shape.rows, shape.length, tokens)


@given(rows_and_shape())
@settings(suppress_health_check=list(HealthCheck))
def test_padded(drawn: tuple[list[TokenRow], Shape]) -> None:
    """Ids, mask and labels of each row stand at its left; all else is padding without a label."""
    rows, shape = drawn
    batch = collate(rows, shape, pad_id=99)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape == (shape.rows, shape.length)
    for i in range(shape.rows):
        row = rows[i] if i < len(rows) else TokenRow("", np.empty(0, np.int32), np.empty(0, np.bool_))
        n = len(row)
        assert batch.input_ids[i].tolist() == row.ids.tolist() + [99] * (shape.length - n)
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (shape.length - n)
        labels = [int(id) if t else IGNORED for id, t in zip(row.ids, row.trained, strict=True)]
        assert batch.labels[i].tolist() == labels + [IGNORED] * (shape.length - n)
    assert batch.metadata.rows == tuple(row.source for row in rows)
    assert batch.metadata.tokens == sum(map(len, rows))
    assert batch.metadata.trained_tokens == np.count_nonzero(batch.labels != IGNORED)
    assert batch.metadata.positions == batch.input_ids.size


@given(rows_and_shape(), st.integers(1, 12))
@settings(suppress_health_check=list(HealthCheck))
def test_unpadded(drawn: tuple[list[TokenRow], Shape], predictions: int) -> None:
    """The grid holds the rows, cells are its inverse, and each trained token is predicted by the one before it."""
    rows, shape = drawn
    predictions = min(predictions, shape.tokens)
    batch = collate_unpadded(rows, shape, predictions, pad_id=99)
    tokens = sum(map(len, rows))
    assert batch.input_ids.tolist() == [int(id) for row in rows for id in row.ids] + [99] * (shape.tokens - tokens)
    flat = batch.grid.reshape(-1)
    assert flat[batch.cells[:tokens]].tolist() == list(range(tokens))
    for i, row in enumerate(rows):
        assert batch.input_ids[batch.grid[i, : len(row)]].tolist() == row.ids.tolist()
    assert (
        flat[[c for c in range(flat.size) if c not in set(batch.cells[:tokens].tolist())]] == shape.tokens - 1
    ).all()
    beyond = {i * shape.length + k for i, row in enumerate(rows) for k in range(len(row), shape.length)}
    beyond |= set(range(len(rows) * shape.length, flat.size))
    assert set(batch.cells[tokens:].tolist()) <= beyond
    pairs = [(int(row.ids[k - 1]), int(row.ids[k])) for row in rows for k in np.flatnonzero(row.trained)]
    real = batch.weights != 0
    told = zip(batch.input_ids[batch.predicting[real]].tolist(), batch.targets[real].tolist(), strict=True)
    assert list(told) == pairs
    assert len(batch.targets) == (predictions if len(pairs) < predictions <= shape.tokens else shape.tokens + 1)
    assert batch.predictions[batch.predicting[real]].tolist() == np.flatnonzero(real).tolist()
    others = np.delete(batch.predictions, batch.predicting[real])
    assert (others == len(batch.targets) - 1).all()
    assert set(batch.weights[real]) <= {1.0}
    assert batch.weights[-1] == 0
    assert not batch.targets[~real].any()
    assert batch.metadata.positions == shape.tokens


def test_metadata_names_the_rows(tmp_path: Path) -> None:
    """A batch tells where its rows came from, and how many tokens of them count."""
    rows = [TokenRow(f"a.jsonl:{i}", np.arange(n, dtype=np.int32), np.arange(n) > 1) for i, n in enumerate((4, 3))]
    metadata = collate(rows, Shape(3, 8, 16)).metadata
    assert (metadata.rows, metadata.tokens, metadata.trained_tokens) == (("a.jsonl:0", "a.jsonl:1"), 7, 3)
