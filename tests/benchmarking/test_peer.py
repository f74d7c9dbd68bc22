"""mlx-lm's trainer as the peer: what it is given, and what is counted."""

import doctest

import pytest

from mlx_trainer.benchmarking import peer, units
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.figures import Epoch, Speed, StepMs
from mlx_trainer.benchmarking.peer_clock import PeerClock
from tests.benchmarking.world import World

LENGTHS = (5, 40, 6, 39, 7, 8, 70)
"""In pairs as they come: (5, 40), (6, 39) and (7, 8); the last row is left over."""


def taken(extent: Extent, accumulate: int = 1) -> PeerClock:
    """Take batches of two rows as mlx-lm does, a second each, until the clock has enough."""
    world = World()
    world.wait(10)
    rows = [(list(range(1, length + 1)), 2) for length in LENGTHS]
    clock = PeerClock(extent, rows, 2, accumulate, begun=7.0, now=world.now)
    for _ in clock.batches(peer.as_records(rows), 2, 64, loop=True):
        world.wait(1)
    return clock


def test_figures_are_of_the_rows_that_it_used() -> None:
    """An epoch of three batches is measured: 105 of the 175 tokens, padded to 32 or 64 with one more as a target."""
    report = taken(Extent(steps=3, warmup=3)).report(peak_gb=0.5)
    tokens = sum(LENGTHS) - 70
    positions = 2 * (63 + 63 + 32)
    assert report.speed == Speed(3, 3.0, tokens / 3, (tokens - 2 * 6) / 3, positions / 3, 2.0, 1 - tokens / positions)
    assert report.step_ms == StepMs(1000.0, 1000.0, 1000.0, 1000.0)
    assert report.epoch == Epoch(3, 3.0, False, 3.0)
    assert (report.peak_gb, report.longest_seen, report.first_step_s) == (0.5, True, 4.0)


def test_a_step_is_an_update_of_several_batches() -> None:
    """With two batches an update, six batches are two epochs and three updates."""
    report = taken(Extent(steps=2, warmup=1), accumulate=2).report(peak_gb=0.5)
    assert (report.speed.steps, report.speed.seconds, report.step_ms.mean, report.first_step_s) == (2, 4.0, 2000.0, 5.0)
    assert report.epoch == Epoch(3, 3.0, False, 3.0)


def test_warm_is_what_has_seen_every_width() -> None:
    """Two widths, or the first epoch; a run that is too short for its epoch has it estimated."""
    assert taken(Extent(steps=1)).warm.steps in (2, 3)
    report = taken(Extent(steps=1, warmup=1)).report(peak_gb=0.5)
    assert report.epoch == Epoch(3, 3.0, True, 3.0)


@pytest.mark.parametrize("module", [peer, units])
def test_examples_in_docstrings(module: object) -> None:
    """Each gives what it shows."""
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]
