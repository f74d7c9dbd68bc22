"""Memory while training."""

import logging
import threading

from mlx_trainer import runtime
from mlx_trainer.callback import Callback
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.memory import check_available, log_memory, read_memory
from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)


class MemoryMonitor(Callback):
    """Adds `memory/peak_gb`, `active_gb`, `cache_gb`, `used_gb` and `percent_used` to each log, in GB of 1e9 bytes.

    The peak is that of arrays since the run began. At the start one line tells what is used and available, with a
    warning where that is less than `required_gb`; later one warning where `percent_used` passes `limit_percent`.
    `sample_every_s` starts a thread that reads the memory so often and adds the highest reading since the last log as
    `memory/used_peak_gb`: on a CPU the whole process, Python included, which MLX's own peak does not count.

    Costs nothing between log points, at one a reading of about 0.1 ms; the thread, as much for each of its readings.
    """

    def __init__(
        self, limit_percent: float = 90.0, required_gb: float | None = None, sample_every_s: float | None = None
    ) -> None:
        if sample_every_s is not None and not sample_every_s > 0:
            raise ValueError(f"MemoryMonitor: sample_every_s is {sample_every_s}; it must be above 0 seconds")
        self.limit_percent, self.required_gb, self.sample_every_s = limit_percent, required_gb, sample_every_s
        self._sampler: MemorySampler | None = None

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Log what there is, and start a new peak."""
        self._warned = False
        runtime.reset_peak_memory()
        log_memory("before training")
        if self.required_gb is not None:
            check_available(self.required_gb)
        if self.sample_every_s is not None:
            self._sampler = MemorySampler(self.sample_every_s)
            self._sampler.start()

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Add a reading."""
        now = read_memory()
        for name in ("peak_gb", "active_gb", "cache_gb", "used_gb", "percent_used"):
            metrics[f"memory/{name}"] = getattr(now, name)
        if self._sampler is not None:
            metrics["memory/used_peak_gb"] = max(self._sampler.take_peak(), now.used_gb)
        if now.percent_used > self.limit_percent and not self._warned:
            self._warned = True
            logger.warning("step %d: memory is above %.0f %% of what there is: %s", step, self.limit_percent, now)

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """End the thread."""
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None


class MemorySampler(threading.Thread):
    """Reads the memory every `seconds` until stopped, and keeps the highest `used_gb`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(name="memory-sampler", daemon=True)
        self.seconds = seconds
        self._peak_gb = 0.0
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Read until `stop`."""
        while not self._stopped.wait(self.seconds):
            used_gb = read_memory().used_gb
            with self._lock:
                self._peak_gb = max(self._peak_gb, used_gb)

    def take_peak(self) -> float:
        """The highest reading since the last call, in GB; 0 without any."""
        with self._lock:
            peak_gb, self._peak_gb = self._peak_gb, 0.0
        return peak_gb

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self.join()
