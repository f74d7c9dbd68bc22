"""Memory readings in GB, and the check before training."""

import logging

import pytest

from mlx_trainer import runtime
from mlx_trainer.monitoring import MemoryStats, check_available, log_memory, read_memory

READING = runtime.MemoryBytes(
    active=3_000_000_000,
    cache=500_000_000,
    peak=5_000_000_000,
    used=4_000_000_000,
    available=10_000_000_000,
    limit=16_000_000_000,
)


def test_a_reading_is_in_units_of_1e9_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each figure is its counter divided by 1e9, and the percentage is of the limit."""
    monkeypatch.setattr(runtime, "memory_bytes", lambda: READING)
    assert read_memory() == MemoryStats(
        used_gb=4.0, available_gb=10.0, peak_gb=5.0, percent_used=37.5, active_gb=3.0, cache_gb=0.5
    )


def test_a_reading_is_logged_with_its_context(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says when it was taken and every figure, and the reading is returned."""
    monkeypatch.setattr(runtime, "memory_bytes", lambda: READING)
    with caplog.at_level(logging.INFO, logger="mlx_trainer"):
        assert log_memory("after loading") == read_memory()
    assert [record.getMessage() for record in caplog.records] == [
        "memory after loading: 4.00 GB used, 10.00 GB available (38 % taken), "
        "arrays 3.00 GB, peak 5.00 GB, cache 0.50 GB"
    ]


def test_what_is_required_is_compared_with_what_is_available(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to the available amount the answer is yes and silent, above it no, with both figures in a warning."""
    monkeypatch.setattr(runtime, "memory_bytes", lambda: READING)
    assert check_available(10.0)
    assert caplog.records == []
    assert not check_available(10.1)
    assert "10.1 GB of memory are needed and 10.0 GB are available" in caplog.text


def test_this_machine_has_memory() -> None:
    """A real reading is positive and below the limit."""
    stats = read_memory()
    assert 0 < stats.percent_used < 100
    assert stats.available_gb > 0
    assert check_available(0.001)
