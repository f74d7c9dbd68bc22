"""Memory while training."""

import logging
import threading

import mlx.core as mx

from mlx_trainer import runtime
from mlx_trainer.callback import Callback
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.memory import check_available, log_memory, read_memory
from mlx_trainer.trainer import Trainer

logger = logging.getLogger(__name__)

REMEDY = "use smaller batches, shorter rows, recompute or a 4-bit model, or give it more memory, and resume"


class MemoryMonitor(Callback):
    """Adds `memory/peak_gb`, `active_gb`, `cache_gb`, `used_gb` and `percent_used` to each log, in GB of 1e9 bytes.

    The peak is that of arrays since the run began. At the start one line tells what is used and available, with a
    warning where that is less than `required_gb`, or than the module estimates for a batch of any shape; later one
    warning where `percent_used` passes `limit_percent`. On Metal the model is wired (see `runtime.wire_memory`).
    `sample_every_s` starts a thread that reads the memory so often and adds the highest reading since the last log as
    `memory/used_peak_gb`: on a CPU the whole process, Python included, which MLX's own peak does not count.

    `stop_percent` ends the run in order, with its checkpoint, where so much of the machine's, the container's or the
    card's memory is taken; a run that the system kills for want of memory loses what came after its last checkpoint.
    None by default, for a run that lives close to the limit may be healthy; 95 suits a container without swap. The
    memory is read by the thread (each 0.5 s unless `sample_every_s` says otherwise), so that a single step which asks
    for more than there is still ends the process.

    Costs nothing between log points, at one a reading of about 0.2 ms; the thread, as much for each of its readings.
    """

    def __init__(
        self,
        limit_percent: float = 90.0,
        required_gb: float | None = None,
        sample_every_s: float | None = None,
        stop_percent: float | None = None,
    ) -> None:
        if sample_every_s is not None and not sample_every_s > 0:
            raise ValueError(f"MemoryMonitor: sample_every_s is {sample_every_s}; it must be above 0 seconds")
        if stop_percent is not None and not 0 < stop_percent <= 100:
            raise ValueError(
                f"MemoryMonitor: stop_percent is {stop_percent}; it must be above 0 and at most 100, or None"
            )
        self.limit_percent, self.required_gb, self.sample_every_s = limit_percent, required_gb, sample_every_s
        self.stop_percent = stop_percent
        self._sampler: MemorySampler | None = None

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Log what there is, and start a new peak."""
        self._warned = False
        runtime.wire_memory()
        runtime.reset_peak_memory()
        log_memory("before training")
        required_gb = max(self.required_gb or 0.0, missing_gb(trainer, module))
        if required_gb > 0:
            check_available(required_gb)
        if self.sample_every_s is not None or self.stop_percent is not None:
            self._sampler = MemorySampler(self.sample_every_s or 0.5, self.stop_percent)
            self._sampler.start()

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Ask for the end where memory runs out; what MLX keeps to use again is given back first."""
        if self._sampler is None or not self._sampler.above.is_set():
            return
        mx.clear_cache()
        now = read_memory()
        if now.percent_used < (self.stop_percent or 100):
            self._sampler.above.clear()
            return
        reason = f"memory: {now.percent_used:.0f} % is taken, stop_percent is {self.stop_percent:g}"
        logger.warning("step %d: %s (%s). %s", step, reason, now, REMEDY)
        trainer.request_stop(f"{reason}; {REMEDY}")

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


def missing_gb(trainer: Trainer, module: TrainerModule) -> float:
    """What a step needs beyond what arrays hold now, in GB, as `module` estimates it; 0 where nobody can tell.

    The largest of all shapes that the loader says there are (`of_each_shape`), so it is known before step 1.
    """
    shapes = getattr(trainer.train_loader, "of_each_shape", None)
    estimates = [module.memory_estimate(batch) for batch in shapes()] if callable(shapes) else []
    peak = max((estimate for estimate in estimates if estimate is not None), default=0)
    return max(peak / 1e9 - read_memory().active_gb, 0.0) if peak else 0.0


class MemorySampler(threading.Thread):
    """Reads the memory every `seconds` until stopped, keeps the highest `used_gb`, sets `above` at `stop_percent`."""

    def __init__(self, seconds: float, stop_percent: float | None = None) -> None:
        super().__init__(name="memory-sampler", daemon=True)
        self.seconds, self.stop_percent = seconds, stop_percent
        self.above = threading.Event()
        self._peak_gb = 0.0
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """Read until `stop`."""
        while not self._stopped.wait(self.seconds):
            now = read_memory()
            if self.stop_percent is not None and now.percent_used >= self.stop_percent:
                self.above.set()
            with self._lock:
                self._peak_gb = max(self._peak_gb, now.used_gb)

    def take_peak(self) -> float:
        """The highest reading since the last call, in GB; 0 without any."""
        with self._lock:
            peak_gb, self._peak_gb = self._peak_gb, 0.0
        return peak_gb

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._stopped.set()
        self.join()
