"""Everything that differs between Metal, CUDA and the CPU: what to set before MLX starts, and facts about the device.

Tried on Linux CPUs. The Metal branches are written to MLX's documentation and could not be run here.
"""

import importlib.util
import math
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from attrs import frozen

from mlx_trainer import _blas, _kernels, _malloc

Backend = Literal["metal", "cuda", "cpu"]

DEQUANTIZE_FROM_ROWS: dict[Backend, float] = {"cpu": 32, "cuda": 256, "metal": math.inf}
"""From so many rows on, dequantizing a packed weight and multiplying beats `mx.quantized_matmul`.

Dequantizing costs the same for any number of rows and grows with the weight, as the product of one row does: where the
two cross hardly depends on the layer's size. It is fixed, not measured when a run starts, since the two round
differently and a continued run must round as before. `benchmarks/quantized.py` shows it for a machine. CPU, float32: 8
rows for 4 or 8 bits, 32 for 6 bits or mxfp4; fewer in 16-bit types. CUDA: reckoned from a 7B model's steps on an H200.
Metal: not measured, so MLX's own way is kept.
"""

CUDA_SETTINGS = {"MLX_USE_CUDA_GRAPHS": "0", "MLX_MAX_OPS_PER_BUFFER": "40", "MLX_MAX_MB_PER_BUFFER": "100"}
"""What MLX is told on CUDA, where the user has told it nothing else.

Kernels and products are launched as they come. MLX makes graphs of them by itself, each product captured on its own,
which made steps 2 to 13 % slower (mlx 0.32.4, docs/performance.md). What a queued command needs is held until all of
its buffer is done, so small buffers need less memory: MLX's own nearly twice as much, and 100 commands in place of 40 a
tenth more. The last is for graphs, where a user switches them on.
"""

_report = ""
_set_here: dict[str, str | None] = {}
"""Environment variables as they were before they were set here."""


def prepare() -> None:
    """Set up what has to be right before MLX computes; called by `import mlx_trainer`, and idempotent.

    On a Linux CPU `mlx.core` is imported and gets an optimized BLAS (about 5 ms more than the import, see `_blas.py`),
    with one thread less than there are CPUs, at least one: its threads wait for each other without sleeping, so that
    where another program wants a CPU, all of them together make a step several times as long (docs/benchmark.md).
    On CUDA, MLX gets `CUDA_SETTINGS`, which it reads once, at its first use. Where others could plant kernels in MLX's
    folder, the temporary folder of this process becomes one that is the user's own (`_kernels.py`).
    """
    global _report
    if (temporary := _kernels.private_temporary(cache_directory() / "kernels")) is not None:
        _set("TMPDIR", temporary)
    if sys.platform != "linux":
        _report = f"BLAS: {'Accelerate, part of macOS' if sys.platform == 'darwin' else 'as MLX brings it'}"
    elif _has_cuda():
        for name, value in CUDA_SETTINGS.items():
            if name not in os.environ:
                _set(name, value)
        _report = "BLAS: not needed, MLX runs on CUDA"
    elif not _report:
        import mlx.core  # noqa: F401  (the library whose calls are redirected)

        _report = _blas.load(max(available_cpus() - 1, 1))


def foreign_environment() -> dict[str, str]:
    """Return the environment as it was before `prepare`, for programs that are to run without its settings."""
    return {name: value for name, value in (dict(os.environ) | _set_here).items() if value is not None}


def blas_report() -> str:
    """Return one line that says which BLAS multiplies MLX's matrices on this CPU, and with how many threads."""
    return _report or "BLAS: as MLX brings it"


def backend() -> Backend:
    """Return what MLX computes on now: its default device, so `mx.set_default_device(mx.cpu)` counts."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def linux_cpu() -> bool:
    """Whether MLX computes on a Linux CPU: on one thread, exponentials one by one, rotations in some twenty steps."""
    return sys.platform == "linux" and backend() == "cpu"


def dequantizing_wins(rows: int) -> bool:
    """Whether a product of `rows` rows with a packed weight is faster where the weight is dequantized first."""
    return rows >= DEQUANTIZE_FROM_ROWS[backend()]


def device_name() -> str:
    """Return the device's name for people, such as `Apple M3 Max` or `NVIDIA H200`."""
    import mlx.core as mx

    return str(mx.device_info().get("device_name") or platform.processor() or platform.machine())


def available_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, cut to a container's quota."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for folder in _control_groups(""):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit():
            count = min(count, max(1, round(int(quota) / int(period))))
    return count


def memory_limit_bytes() -> int:
    """Return the most memory that training may use.

    Metal: the working set that macOS recommends. CUDA: the device's memory. CPU: the machine's memory, or the
    limit of the control group or of the address space (`ulimit -v`) where that is less.
    """
    import mlx.core as mx

    if (here := backend()) == "cpu":
        return _cpu_memory_limit()
    return int(mx.device_info()["max_recommended_working_set_size" if here == "metal" else "total_memory"])


@cache
def _cpu_memory_limit() -> int:
    import psutil

    return min([int(psutil.virtual_memory().total), _address_space(), *(limit for _, _, limit in _memory_groups())])


@cache
def _memory_groups() -> tuple[tuple[Path, Path, int], ...]:
    """The control groups around this process that bound its memory: what they hold, of which kinds, and their limit."""
    files = [(folder, "memory.max", "memory.current") for folder in _control_groups("")]
    files += [(folder, "memory.limit_in_bytes", "memory.usage_in_bytes") for folder in _control_groups("memory")]
    limits = [(folder / used, folder / "memory.stat", _read(folder / limit)) for folder, limit, used in files]
    return tuple((used, kinds, int(limit)) for used, kinds, limit in limits if limit.isdigit())


def _left_in_groups() -> Iterator[int]:
    """The bytes that each bounding group has left; a file's pages that nobody used lately are given back when needed.

    Other processes of a container count too, so that this may be less than the limit leaves to this process.
    """
    for used, kinds, limit in _memory_groups():
        if (held := _read(used)).isdigit():
            lines = (line.rpartition(" ") for line in _read(kinds).splitlines())
            idle = max((int(n) for name, _, n in lines if name in ("inactive_file", "total_inactive_file")), default=0)
            yield limit - int(held) + idle


def _address_space() -> int:
    """The limit of `ulimit -v`, as batch systems set it, in bytes; beyond it MLX's allocation ends the process."""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


@frozen
class MemoryBytes:
    """One reading of the device's memory, in bytes.

    `active` is what live arrays hold, `cache` what MLX keeps to use again, `peak` the largest `active` since the last
    `reset_peak_memory`, `used` what this process takes from `limit`, and `available` what it could still take.
    """

    active: int
    cache: int
    peak: int
    used: int
    available: int
    limit: int


def memory_bytes() -> MemoryBytes:
    """Read the memory counters, in 0.1 to 0.3 ms on a CPU; nothing on the device is waited for."""
    import mlx.core as mx

    active, cache, peak, limit = (
        mx.get_active_memory(),
        mx.get_cache_memory(),
        mx.get_peak_memory(),
        memory_limit_bytes(),
    )
    if backend() == "cpu":
        return _cpu_memory(active, cache, peak, limit)
    # What MLX has cached serves its next arrays, so only live ones stand in their way. Other processes' share is
    # known on CUDA alone.
    free = mx.device_info().get("free_memory") if backend() == "cuda" else None
    available = limit - active if free is None else min(limit - active, int(free) + cache)
    return MemoryBytes(active, cache, max(peak, active), active + cache, max(available, 0), limit)


def bound_memory(needed: int = 0, most: int = 0) -> None:
    """Let MLX keep as much memory for arrays to come as a step that needs `needed` bytes leaves free.

    At most as much again as the step needs, and a sixteenth of the memory where that is more or not known; by itself
    MLX keeps most of a card. At least a 128th. A step lets go of most of what it needs and asks for it again, which the
    system answers slowly. On a Linux CPU malloc keeps arrays too (`_malloc.py`), so no sixteenth. Metal was not tried.

    On CUDA, where `most` bytes are given, work that is queued waits while more than these are held, and the cache has
    what is left of them: MLX gives memory out when it queues an operation, long before it runs. Without, 95 % of the
    card, as MLX has it.
    """
    import mlx.core as mx

    limit = memory_limit_bytes()
    least = _malloc.LARGEST if linux_cpu() and _malloc.keep_freed() else limit // 16
    mx.set_cache_limit(min(max(needed, least), max(limit - needed, limit // 128)))
    if backend() == "cuda":
        mx.set_memory_limit(most or limit * 95 // 100)


def wire_memory() -> None:
    """On Metal keep the model's memory from being paged out, and MLX within what macOS recommends; else do nothing.

    Without it macOS may page weights out between steps. CUDA and the CPU have nothing to wire. Written to MLX's
    documentation and not tried on Metal.
    """
    import mlx.core as mx

    if backend() == "metal":
        mx.set_wired_limit(memory_limit_bytes())
        mx.set_memory_limit(memory_limit_bytes())


def cudnn_attention() -> bool:
    """Return whether attention in 16 bits is cuDNN's, whose gradient adds up in no fixed order: no run repeats it.

    `MLX_CUDA_USE_CUDNN_SDPA=0`, MLX's own switch, leaves that to kernels which keep an order.
    """
    return backend() == "cuda" and os.environ.get("MLX_CUDA_USE_CUDNN_SDPA") != "0"


def attention_step() -> int:
    """Return the multiple that rows of attention should be long.

    cuDNN takes twice as long for other lengths than multiples of 128 (`benchmarks/attention.py`).

    More: where the queries are a multiple of 128 and the keys are not, MLX's gradient reads beyond its memory and ends
    the process (0.32.4, 256 queries, 656 keys).
    """
    return 128 if backend() == "cuda" else 8


def cache_directory() -> Path:
    """Return the folder for what can be made again: MLX_TRAINER_CACHE, else that of the system for this user."""
    if own := os.environ.get("MLX_TRAINER_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_trainer"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_trainer"


def reset_peak_memory() -> None:
    """Let the peak start again from what is held now."""
    import mlx.core as mx

    mx.reset_peak_memory()


def _cpu_memory(active: int, cache: int, peak: int, limit: int) -> MemoryBytes:
    """Return the CPU's reading: `used` is the whole process, since Python and MLX draw on the same memory."""
    import resource

    import psutil

    mapped = psutil.Process().memory_info()
    used = int(mapped.rss)
    if (
        peak == active == 0
    ):  # an MLX that counts nothing on the CPU, or nothing allocated yet: the process's own figures
        active, peak = (
            used,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        )
    left = (limit - used, _address_space() - int(mapped.vms), *_left_in_groups())
    available = min(int(psutil.virtual_memory().available), *left)
    return MemoryBytes(active, cache, max(peak, active), used, max(available, 0), limit)


def _set(name: str, value: str) -> None:
    _set_here.setdefault(name, os.environ.get(name))
    os.environ[name] = value


def _has_cuda() -> bool:
    """Tell, without importing MLX, whether its CUDA build is installed and a GPU driver is present."""
    spec = importlib.util.find_spec("mlx")
    folders = (spec.submodule_search_locations or []) if spec else []
    built = any(any(Path(folder).parent.glob("mlx_cuda*")) for folder in folders)
    return built and any(os.path.exists(node) for node in ("/dev/nvidiactl", "/dev/dxg"))


def _control_groups(controller: str) -> Iterator[Path]:
    """Yield the folders whose limits bind this process, its own group first, then every group around it.

    The controller is empty for version 2, whose line in /proc/self/cgroup is `0::/path`.
    """
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = Path("/sys/fs/cgroup", controller)
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _read(path: Path) -> str:
    """Return a small text file's content without the white space around it, or nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
