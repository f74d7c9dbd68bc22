"""Collating rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.data.batch import IGNORED, collate, padded_length
from mlx_trainer.data.rows import TokenRow


def row(length: int, trained: list[int], number: int = 0) -> TokenRow:
    """A row of `length` distinct ids, trained at the positions `trained`."""
    mask = np.isin(np.arange(length), trained)
    return TokenRow(f"chats.jsonl:{number + 1}", number, np.arange(100, 100 + length, dtype=np.int32), mask)


def test_a_batch_of_two_rows() -> None:
    """Uneven rows are padded on the right; labels stand only where a row is trained."""
    batch = collate([row(3, [2]), row(40, [5, 39], 1)], max_seq_length=50, pad_id=7)
    assert batch.input_ids.shape == batch.labels.shape == batch.attention_mask.shape == (2, 50)
    assert {array.dtype for array in (batch.input_ids, batch.labels, batch.attention_mask)} == {np.dtype(np.int32)}
    assert batch.input_ids[0].tolist() == [100, 101, 102] + [7] * 47
    assert batch.attention_mask.sum(axis=1).tolist() == [3, 40]
    assert np.argwhere(batch.labels != IGNORED).tolist() == [[0, 2], [1, 5], [1, 39]]
    assert batch.labels[1, [5, 39]].tolist() == [105, 139]
    assert batch.metadata.rows == ("chats.jsonl:1", "chats.jsonl:2")
    assert (batch.metadata.tokens, batch.metadata.trained_tokens) == (43, 3)


@given(st.lists(st.tuples(st.integers(2, 90), st.data()), min_size=1, max_size=5), st.integers(90, 200))
def test_labels_are_where_rows_are_trained(drawn: list[tuple[int, st.DataObject]], max_seq_length: int) -> None:
    """No padding and no untrained position has a label; every trained one has its own id."""
    rows = [row(n, data.draw(st.lists(st.integers(1, n - 1), unique=True)), i) for i, (n, data) in enumerate(drawn)]
    batch = collate(rows, max_seq_length=max_seq_length)
    for labels, mask, ids, source in zip(batch.labels, batch.attention_mask, batch.input_ids, rows, strict=True):
        assert (labels[mask == 0] == IGNORED).all()
        assert (labels[: len(source)] != IGNORED).tolist() == source.trained.tolist()
        assert labels[labels != IGNORED].tolist() == source.ids[source.trained].tolist()
        assert ids[: len(source)].tolist() == source.ids.tolist()
    assert batch.metadata.trained_tokens == (batch.labels[:, 1:] != IGNORED).sum()


@given(st.integers(1, 3000), st.integers(2, 3000))
def test_few_shapes(length: int, max_seq_length: int) -> None:
    """Lengths are multiples of 32 or the maximum, never shorter than the row and never a whole step longer."""
    length = min(length, max_seq_length)
    padded = padded_length(length, max_seq_length)
    assert length <= padded < length + 32
    assert padded % 32 == 0 or padded == max_seq_length
