"""Windows of micro-batches, and positions."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.loaders import first_batches, windows
from tests.toy import ToyLoader, toy_batches


@given(st.integers(1, 30), st.integers(1, 7), st.data())
def test_windows_are_what_is_left_of_the_epoch_in_order(size: int, accumulate: int, data: st.DataObject) -> None:
    """All of one length but the last; from any position on, nothing twice and nothing left out."""
    position = data.draw(st.integers(0, size))
    loader = ToyLoader(toy_batches([1] * size))
    loader.position = position

    parts = list(windows(loader, accumulate, position))

    expected = ToyLoader(loader.batches)
    assert [id(batch) for part in parts for batch in part] == [id(batch) for batch in expected][position:]
    assert [len(part) for part in parts[:-1]] == [accumulate] * (len(parts) - 1)


def test_a_loader_is_never_ahead_of_the_window_taken() -> None:
    """Its own position is right whenever a step is done, also after the short last window."""
    loader = ToyLoader(toy_batches([1] * 5))
    positions = [(len(window), loader.state_dict()) for window in windows(loader, 2, 0)]

    assert positions == [
        (2, {"epoch": 0, "position": 2}),
        (2, {"epoch": 0, "position": 4}),
        (1, {"epoch": 0, "position": 5}),
    ]
    assert loader.state_dict() == {"epoch": 1, "position": 0}


def test_first_batches_takes_a_number_or_a_share() -> None:
    """A share is rounded up, so that it is never nothing; None is the loader itself."""
    batches = toy_batches([1] * 5)
    assert first_batches(batches, None) is batches
    assert first_batches(batches, 2) == batches[:2]
    assert first_batches(batches, 0.3) == batches[:2]
    assert first_batches(batches, 1.0) == batches
