"""Memory readings for people, in GB of 1e9 bytes, and the check before training."""

import logging

from attrs import frozen

from mlx_trainer import runtime

_log = logging.getLogger("mlx_trainer.monitoring")
_GB = 1e9


@frozen
class MemoryStats:
    """One reading of the device's memory, in GB of 1e9 bytes.

    `used_gb` is what this process takes (on the CPU all of it, Python included), `available_gb` what it could still
    take, `peak_gb` the most that arrays held since the last reset, `percent_used` the part of the limit (that of
    `runtime.memory_limit_bytes`) which is not available, `active_gb` what live arrays hold and `cache_gb` what MLX
    keeps to use again, and which is available therefore.
    """

    used_gb: float
    available_gb: float
    peak_gb: float
    percent_used: float
    active_gb: float
    cache_gb: float

    def __str__(self) -> str:
        return (
            f"{self.used_gb:.2f} GB used, {self.available_gb:.2f} GB available ({self.percent_used:.0f} % taken), "
            f"arrays {self.active_gb:.2f} GB, peak {self.peak_gb:.2f} GB, cache {self.cache_gb:.2f} GB"
        )


def read_memory() -> MemoryStats:
    """Read the memory counters, in about 0.1 ms; nothing on the device is waited for."""
    now = runtime.memory_bytes()
    return MemoryStats(
        used_gb=now.used / _GB,
        available_gb=now.available / _GB,
        peak_gb=now.peak / _GB,
        percent_used=100 * (1 - now.available / now.limit),
        active_gb=now.active / _GB,
        cache_gb=now.cache / _GB,
    )


def log_memory(context: str) -> MemoryStats:
    """Read the memory and log it in one line that begins with the context, such as "after loading the model"."""
    stats = read_memory()
    _log.info("memory %s: %s", context, stats)
    return stats


def check_available(required_gb: float) -> bool:
    """Tell whether so much memory is available, and log a warning where it is not.

    It does not raise: what a run requires is an estimate, and the caller knows whether to stop or to go on.
    """
    available_gb = read_memory().available_gb
    if required_gb <= available_gb:
        return True
    _log.warning(
        "about %.1f GB of memory are needed and %.1f GB are available on this %s; "
        "a smaller batch, shorter rows or a 4-bit model need less",
        required_gb,
        available_gb,
        runtime.device_name(),
    )
    return False
