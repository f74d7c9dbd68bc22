import threading
import time
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer.callbacks import LambdaCallback, MemoryMonitor, memory_monitor
from mlx_trainer.monitoring import MemoryStats
from tests.callbacks.toy import fit


def stats(used_gb: float) -> MemoryStats:
    """Return a reading of a machine with 10 GB."""
    return MemoryStats(used_gb, 10.0 - used_gb, 1.5, 10 * used_gb, 0.5, 0.25)


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of used GB of 10, one for each reading of the memory, the last for all others."""
    used: list[float] = [1.0]
    monkeypatch.setattr(memory_monitor, "read_memory", lambda: stats(used.pop(0) if len(used) > 1 else used[0]))
    return used


def test_readings_join_the_logged_metrics(readings: list[float]) -> None:
    """Each log has the five values by their tags."""
    _, result = fit([MemoryMonitor()])
    assert {name: value for name, value in result.metrics.items() if name.startswith("memory/")} == {
        "memory/peak_gb": 1.5,
        "memory/active_gb": 0.5,
        "memory/cache_gb": 0.25,
        "memory/used_gb": 1.0,
        "memory/percent_used": 10.0,
    }


def test_the_peak_is_that_of_the_run() -> None:
    """What arrays held before the run does not count."""
    mx.eval(mx.zeros(100_000_000, mx.uint8))
    assert mx.get_peak_memory() >= 100_000_000
    assert 0.0 < fit([MemoryMonitor()])[1].metrics["memory/peak_gb"] < 0.1


def test_one_warning_above_the_limit(readings: list[float], caplog: pytest.LogCaptureFixture) -> None:
    """Told at the first log above limit_percent, and not again."""
    readings[:] = [5.0, 9.0, 9.5]
    with caplog.at_level("WARNING"):
        fit([MemoryMonitor(limit_percent=80.0)])
    assert caplog.messages == [f"step 4: memory is above 80 % of what there is: {stats(9.0)}"]


def test_the_start_tells_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    """One line before training; with required_gb beyond what is available, a warning too."""
    with caplog.at_level("INFO", logger="mlx_trainer.monitoring"):
        fit([MemoryMonitor()])
        assert [message.split(":")[0] for message in caplog.messages] == ["memory before training"]
        caplog.clear()
        fit([MemoryMonitor(required_gb=1e6)])
    assert caplog.messages[1].startswith("about 1000000.0 GB of memory are needed and ")


def test_a_thread_sees_peaks_between_log_points(readings: list[float]) -> None:
    """A reading that no log point coincides with is reported by the next one, and the thread ends with the run."""
    readings[:] = [2.0, 7.0, 3.0]

    def wait(trainer: Any, module: Any, step: int) -> None:
        while len(readings) > 1:
            time.sleep(0.002)

    logged: list[float] = []
    note = LambdaCallback(
        on_step_start=wait, on_log=lambda trainer, module, step, metrics: logged.append(metrics["memory/used_peak_gb"])
    )
    fit([MemoryMonitor(sample_every_s=0.001), note])
    assert logged == [7.0, 3.0, 3.0]
    assert "memory-sampler" not in [thread.name for thread in threading.enumerate()]


def test_the_thread_ends_with_a_failed_run() -> None:
    """teardown stops it, whatever happened."""

    def fail(trainer: Any, module: Any, step: int) -> None:
        assert "memory-sampler" in [thread.name for thread in threading.enumerate()]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit([MemoryMonitor(sample_every_s=0.001), LambdaCallback(on_step_end=fail)])
    assert "memory-sampler" not in [thread.name for thread in threading.enumerate()]


def test_an_interval_that_is_none_is_refused() -> None:
    """A thread that never waits would take the host's time."""
    with pytest.raises(ValueError, match="sample_every_s is 0"):
        MemoryMonitor(sample_every_s=0)
