import threading
import time
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer.callbacks import LambdaCallback, MemoryMonitor, memory_monitor
from mlx_trainer.monitoring import MemoryStats
from mlx_trainer.trainer import Trainer
from tests.callbacks.toy import Regression, batches, fit


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


def wait_for_sampler(monitor: MemoryMonitor) -> LambdaCallback:
    """Return a callback that lets the thread see each reading before the step ends."""

    def wait(trainer: Any, module: Any, step: int) -> None:
        assert monitor._sampler is not None
        monitor._sampler.above.wait(5.0)

    return LambdaCallback(on_step_start=wait)


def test_memory_above_the_limit_stops_the_run(readings: list[float]) -> None:
    """The run ends with the step in which the reading was seen, and the reason says what to change."""
    readings[:] = [9.7]
    monitor = MemoryMonitor(stop_percent=96, sample_every_s=0.001)
    _, result = fit([wait_for_sampler(monitor), monitor])
    assert result.steps == 1
    assert result.stop_reason.startswith("memory: 97 % is taken, stop_percent is 96; use smaller batches")


def test_memory_that_is_there_again_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX's cache was what filled it, it is given back and the run goes on; so it does without a limit."""
    used = [9.7]
    monkeypatch.setattr(memory_monitor, "read_memory", lambda: stats(used[0]))
    monkeypatch.setattr(mx, "clear_cache", lambda: used.__setitem__(0, 5.0))
    monitor = MemoryMonitor(stop_percent=96, sample_every_s=0.001)
    seen: list[bool] = []

    def wait(trainer: Any, module: Any, step: int) -> None:
        if step == 1:
            assert monitor._sampler is not None
            seen.append(monitor._sampler.above.wait(5.0))

    trainer, result = fit([LambdaCallback(on_step_start=wait), monitor])
    assert (seen, used, result.steps) == ([True], [5.0], trainer.total_steps)
    used[0] = 9.99
    assert fit([MemoryMonitor(sample_every_s=0.001)])[1].steps == trainer.total_steps


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_a_limit_that_is_none_is_refused(percent: float) -> None:
    """Nothing at all, or more than there is."""
    with pytest.raises(ValueError, match=f"stop_percent is {percent}"):
        MemoryMonitor(stop_percent=percent)


def test_an_estimate_beyond_what_there_is_is_told_before_the_first_step(caplog: pytest.LogCaptureFixture) -> None:
    """The largest of the module's estimates for all shapes counts; a module that cannot tell is not asked for more."""

    class Estimating(Regression):
        def memory_estimate(self, batch: Any) -> int | None:
            return 10**15 * len(batch.y)

    class Shaped(list[Any]):
        def of_each_shape(self) -> list[Any]:
            return list(self[:3])

    steps: list[int] = []
    note = LambdaCallback(on_step_start=lambda trainer, module, step: steps.append(len(caplog.messages)))
    with caplog.at_level("WARNING", logger="mlx_trainer.monitoring"):
        Trainer(callbacks=[MemoryMonitor(), note]).fit(Estimating(), Shaped(batches()))
    assert [message.split(" and ")[0] for message in caplog.messages] == ["about 4000000.0 GB of memory are needed"]
    assert steps[0] == 1
    caplog.clear()
    with caplog.at_level("WARNING", logger="mlx_trainer.monitoring"):
        Trainer(callbacks=[MemoryMonitor()]).fit(Regression(), Shaped(batches()))
    assert caplog.messages == []
