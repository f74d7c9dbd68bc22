"""The BLAS under MLX on Linux CPUs, and the device facts. What happens at import is tried in fresh processes."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest

from mlx_trainer import _blas, _malloc, runtime
from mlx_trainer.models.attention import fused

on_linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device() != mx.Device(mx.cpu),
    reason="only a Linux CPU takes another BLAS",
)

PRODUCT = """
import hashlib, mlx.core as mx
a, b = (mx.random.normal((300, 300), key=mx.random.key(seed)) for seed in (1, 2))
print(hashlib.sha256(memoryview(a @ b)).hexdigest())
"""
PREPARE = "from mlx_trainer import runtime; runtime.prepare(); print(runtime.blas_report())\n"


def run(program: str, **environment: str) -> list[str]:
    """Run a program in a fresh process, without this one's BLAS variables, and return the lines that it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith(("_NUM_THREADS", "_BLAS"))}
    path = os.pathsep.join([str(Path(__file__).parents[1]), kept.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, "PYTHONPATH": path, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def libmlx() -> Path:
    """Return the library in which MLX's CPU operations are."""
    return next(Path(mx.__file__).parent.glob("lib/libmlx.so"))


@on_linux_cpu
def test_the_symbols_are_those_that_mlx_takes() -> None:
    """Every `cblas_` name in MLX's library is one that we supply, and no other is."""
    named = set(re.findall(rb"\0(cblas_\w+)(?=\0)", libmlx().read_bytes()))
    assert sorted(name.decode() for name in named) == sorted(_blas.GEMM_SYMBOLS)


@on_linux_cpu
def test_the_slots_found_are_those_that_the_loader_filled() -> None:
    """In a fresh MLX, each imported C function that was looked up again has the address that its slot holds."""
    program = """
import ctypes, os, mlx.core
from mlx_trainer import _blas
mlx = ctypes.CDLL("libmlx.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
for name, slot in sorted(_blas.imported_slots(mlx)):
    if name in ("cblas_cgemm", "cblas_dgemm", "cblas_sgemm", "sgetrf_", "malloc"):
        print(name, ctypes.c_size_t.from_address(slot).value == _blas._address(mlx, name))
"""
    names = ["cblas_cgemm", "cblas_dgemm", "cblas_sgemm", "malloc", "sgetrf_"]
    assert sorted(set(run(program, MLX_TRAINER_BLAS="off"))) == [f"{name} True" for name in names]


@on_linux_cpu
def test_products_come_from_the_loaded_blas_and_are_the_same_in_every_process() -> None:
    """Two processes give the same bits, others than the reference BLAS gives, and `off` gives the reference's."""
    report, ours = run(PREPARE + PRODUCT)
    assert re.fullmatch(r"BLAS: OpenBLAS [\d.]+ \(scipy-openblas32\), \d+ threads?", report)
    assert run(PREPARE + PRODUCT) == [report, ours]
    (reference,) = run(PRODUCT)
    assert reference != ours
    off, switched_off = run(PREPARE + PRODUCT, MLX_TRAINER_BLAS="off")
    assert off.startswith("BLAS: switched off by MLX_TRAINER_BLAS=off")
    assert switched_off == reference


@on_linux_cpu
def test_the_order_of_imports_does_not_matter() -> None:
    """A program that imported MLX, and multiplied, gets the optimized product from then on."""
    report, product = run(PREPARE + PRODUCT)
    assert run(PRODUCT + PREPARE + PRODUCT) == [*run(PRODUCT), report, product]


@on_linux_cpu
def test_threads_are_one_less_than_the_cpus_or_what_the_environment_says() -> None:
    """One CPU of affinity gives one thread, and the environment's number outranks that of the CPUs."""
    one_cpu = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert run(one_cpu + PREPARE)[0].endswith(", 1 thread")
    three_cpus = "import os; os.sched_getaffinity = lambda process: {0, 1, 2}\n"
    assert run(three_cpus + PREPARE)[0].endswith(", 2 threads")
    assert run(three_cpus + PREPARE, OPENBLAS_NUM_THREADS="1")[0].endswith(", 1 thread")
    assert run(three_cpus + PREPARE, OMP_NUM_THREADS="1")[0].endswith(", 1 thread")


@on_linux_cpu
def test_products_are_right_in_threads_and_the_process_can_fork() -> None:
    """Four threads that multiply at once get the product of one, and a child forked before MLX's use multiplies."""
    program = """
import os, mlx.core as mx
from concurrent.futures import ThreadPoolExecutor
from mlx_trainer import runtime
runtime.prepare()
def product():
    with mx.stream(mx.new_stream(mx.cpu)):
        a = mx.random.normal((200, 200), key=mx.random.key(1))
        return bytes(memoryview(a @ a))
if (child := os.fork()) == 0:
    os._exit(0 if product() else 1)
assert os.waitpid(child, 0)[1] == 0
with ThreadPoolExecutor(4) as pool:
    print(len({future.result() for future in [pool.submit(product) for _ in range(16)]} | {product()}))
"""
    assert run(program) == ["1"]


@on_linux_cpu
def test_a_library_may_be_named_and_a_wrong_name_warns() -> None:
    """MLX_TRAINER_BLAS takes the path of any BLAS; one that cannot be used is told with the reason."""
    library = next(path for path, origin in _blas._candidates() if origin == "scipy-openblas32")
    report, product = run(PREPARE + PRODUCT, MLX_TRAINER_BLAS=library)
    assert "(MLX_TRAINER_BLAS)" in report
    assert product == run(PREPARE + PRODUCT)[1]
    caught = (
        "import warnings; caught = warnings.catch_warnings(record=True).__enter__(); warnings.simplefilter('always')\n"
    )
    report, warning = run(caught + PREPARE + "print(caught[0].message)", MLX_TRAINER_BLAS="/nowhere/libblas.so")
    assert "/nowhere/libblas.so: cannot open shared object file" in report
    assert warning.startswith("MLX_TRAINER_BLAS names no usable BLAS: /nowhere/libblas.so")


@on_linux_cpu
def test_without_the_package_the_systems_openblas_serves_and_else_the_line_says_how_to_get_one() -> None:
    """The search goes on to what `find_library` knows, and its end is the reference BLAS and an advice."""
    library = next(path for path, _ in _blas._candidates())
    hidden = "import sys, ctypes.util; sys.modules['scipy_openblas32'] = None; ctypes.util.find_library = "
    assert "(system)" in run(f"{hidden} lambda name: {library!r}\n" + PREPARE)[0]
    report = run(f"{hidden} lambda name: None\n" + PREPARE)[0]
    assert report.startswith("BLAS: the reference BLAS")
    assert "pip install scipy-openblas32" in report


@on_linux_cpu
def test_a_blas_that_the_user_preloaded_stays(tmp_path: Path) -> None:
    """Preparing twice does the work once, and a BLAS which LD_PRELOAD put in front of MLX's keeps its place."""
    assert len(set(run(PREPARE + PREPARE))) == 1
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to make a library to preload")
    (tmp_path / "blas.c").write_text("void cblas_sgemm(void) {}\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "blas.so", tmp_path / "blas.c"], check=True)
    report = run(PREPARE, LD_PRELOAD=str(tmp_path / "blas.so"))
    assert report == ["BLAS: left as it is, since another one than MLX's own was loaded before"]


def test_on_cuda_mlx_gets_our_settings_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build gets no graphs, small command buffers and no BLAS; a value in the environment stays."""
    monkeypatch.setattr(runtime, "_has_cuda", lambda: True)
    monkeypatch.setattr(runtime, "_report", "")
    monkeypatch.setattr(runtime, "_set_here", {})
    monkeypatch.setattr(sys, "platform", "linux")
    for name in runtime.CUDA_SETTINGS:
        monkeypatch.delenv(name, raising=False)  # as it was, it comes back
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
    runtime.prepare()
    assert {name: os.environ[name] for name in runtime.CUDA_SETTINGS} == {
        "MLX_USE_CUDA_GRAPHS": "1",
        "MLX_MAX_OPS_PER_BUFFER": "40",
        "MLX_MAX_MB_PER_BUFFER": "100",
    }
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS")
    runtime.prepare()
    assert os.environ["MLX_USE_CUDA_GRAPHS"] == "0"
    assert not runtime.CUDA_SETTINGS.keys() & runtime.foreign_environment().keys()
    assert runtime.blas_report() == "BLAS: not needed, MLX runs on CUDA"


@pytest.mark.parametrize(
    ("backend", "switch", "cudnn"),
    [("cuda", None, True), ("cuda", "1", True), ("cuda", "0", False), ("metal", None, False), ("cpu", "1", False)],
)
def test_attention_that_repeats_no_bits(
    monkeypatch: pytest.MonkeyPatch, backend: str, switch: str | None, cudnn: bool
) -> None:
    """cuDNN's, in 16 bits, unless MLX is told to leave it: the scores are then kept, as in float32."""
    monkeypatch.setattr(runtime, "backend", lambda: backend)
    monkeypatch.delenv("MLX_CUDA_USE_CUDNN_SDPA", raising=False)
    if switch is not None:
        monkeypatch.setenv("MLX_CUDA_USE_CUDNN_SDPA", switch)
    assert runtime.cudnn_attention() is cudnn
    assert (fused(mx.bfloat16), fused(mx.float16), fused(mx.float32)) == (cudnn, cudnn, False)


def test_peak_is_counted_from_the_last_reset() -> None:
    """The peak holds an array that is gone, and forgets it when it is reset."""
    kept = mx.ones(1000)
    mx.eval(kept)
    runtime.reset_peak_memory()
    before = runtime.memory_bytes()
    array = mx.zeros((1000, 1000), mx.float32)
    mx.eval(array)
    held = runtime.memory_bytes()
    del array
    freed = runtime.memory_bytes()
    runtime.reset_peak_memory()
    assert held.active - before.active >= 4_000_000
    assert freed.peak >= held.active > freed.active
    assert runtime.memory_bytes().peak == runtime.memory_bytes().active
    assert 0 < held.used <= held.limit
    assert 0 < held.available < held.limit


def test_a_control_group_cuts_memory_and_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smallest limit of all groups around the process counts, `max` is none, and half a CPU counts as one."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/memory.max").write_text("max\n")
    (tmp_path / "memory.max").write_text("123456789\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    monkeypatch.setattr(runtime, "_control_groups", lambda controller: [tmp_path / "inner", tmp_path])
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    with forgotten_limits():
        assert runtime.memory_limit_bytes() == 123456789
    assert runtime.available_cpus() == 1


@contextmanager
def forgotten_limits() -> Iterator[None]:
    """Read the limits of memory anew inside, and once more afterwards."""
    for known in (runtime._cpu_memory_limit, runtime._memory_groups):
        known.cache_clear()
    yield
    for known in (runtime._cpu_memory_limit, runtime._memory_groups):
        known.cache_clear()


@pytest.mark.parametrize("version", [1, 2])
def test_what_others_in_the_container_hold_is_not_available(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: int
) -> None:
    """Of a group's 1 GB, 900 MB are held and 100 MB of these are idle pages of files: 200 MB are left."""
    limit, used = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
    (tmp_path / f"memory.{limit}").write_text("1000000000\n")
    (tmp_path / f"memory.{used}").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("anon 7\ninactive_file 100000000\nactive_file 5\n")
    monkeypatch.setattr(runtime, "_control_groups", lambda name: [tmp_path] if bool(name) == (version == 1) else [])
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    # This process may hold more than 1 GB after other tests.
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=50_000_000, vms=60_000_000))
    with forgotten_limits():
        now = runtime.memory_bytes()
    assert (now.limit, now.available) == (1_000_000_000, 200_000_000)


def test_the_limit_of_the_address_space_counts() -> None:
    """Under `ulimit -v` the limit is that, and what is mapped already is not available."""
    program = (
        "import resource; from mlx_trainer import runtime; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "now = runtime.memory_bytes(); print(now.limit == 6 << 30, 0 < now.available < 6 << 30)"
    )
    assert run(program) == ["True True"]


@pytest.mark.parametrize(("backend", "limits"), [("metal", [48, 48]), ("cuda", []), ("cpu", [])])
def test_metal_wires_what_it_recommends(monkeypatch: pytest.MonkeyPatch, backend: str, limits: list[int]) -> None:
    """Both limits are the recommended working set on Metal; elsewhere nothing is set."""
    found: list[int] = []
    monkeypatch.setattr(runtime, "backend", lambda: backend)
    monkeypatch.setattr(runtime, "memory_limit_bytes", lambda: 48)
    monkeypatch.setattr(mx, "set_wired_limit", found.append)
    monkeypatch.setattr(mx, "set_memory_limit", found.append)
    runtime.wire_memory()
    assert found == limits


def test_control_groups_are_those_of_the_process_and_all_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions' lines in /proc/self/cgroup lead to the group's folder and every folder up to the controller's."""
    lines = "4:cpu,memory:/a\n1:name=systemd:/\n0::/user/b"
    monkeypatch.setattr(runtime, "_read", lambda path: lines)
    root = Path("/sys/fs/cgroup")
    assert list(runtime._control_groups("")) == [root / "user/b", root / "user", root]
    assert list(runtime._control_groups("memory")) == [root / "memory/a", root / "memory"]


@pytest.mark.parametrize(
    ("backend", "limit", "available"), [("metal", 48_000, 47_000), ("cuda", 80_000, 50_200)], ids=["metal", "cuda"]
)
def test_a_gpus_memory(monkeypatch: pytest.MonkeyPatch, backend: str, limit: int, available: int) -> None:
    """Metal's limit is the recommended working set; on CUDA other processes' memory is missing from what is free."""
    information = {"max_recommended_working_set_size": 48_000, "total_memory": 80_000}
    monkeypatch.setattr(runtime, "backend", lambda: backend)
    monkeypatch.setattr(mx, "device_info", lambda: information | ({"free_memory": 50_000} if backend == "cuda" else {}))
    for name, value in {"active": 1_000, "cache": 200, "peak": 3_000}.items():
        monkeypatch.setattr(mx, f"get_{name}_memory", lambda value=value: value)
    expected = runtime.MemoryBytes(1_000, 200, 3_000, used=1_200, available=available, limit=limit)
    assert runtime.memory_bytes() == expected


@pytest.mark.parametrize(
    ("backend", "needed", "bound"),
    [
        ("cuda", 0, 8_000),
        ("cuda", 50_000, 50_000),
        ("cuda", 125_000, 3_000),
        ("metal", 200_000, 1_000),
        ("cpu", 0, 1_024),
        ("cpu", 3_000, 3_000),
    ],
    ids=["nothing known", "as much again", "what a step leaves", "at least", "cpu", "cpu, as much again"],
)
def test_the_cache_leaves_room_for_a_step(
    monkeypatch: pytest.MonkeyPatch, backend: str, needed: int, bound: int
) -> None:
    """A sixteenth of the memory or as much as a step needs, less where that is not left, a 128th at least.

    On a Linux CPU, where malloc keeps arrays too, no sixteenth.
    """
    bounds: list[int] = []
    monkeypatch.setattr(runtime, "backend", lambda: backend)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(_malloc, "LARGEST", 1_024)
    monkeypatch.setattr(_malloc, "keep_freed", lambda: True)
    monkeypatch.setattr(runtime, "memory_limit_bytes", lambda: 128_000)
    monkeypatch.setattr(mx, "set_cache_limit", bounds.append)
    monkeypatch.setattr(mx, "set_memory_limit", lambda bytes: None)
    runtime.bound_memory(needed)
    assert bounds == [bound]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the switches")
def test_malloc_keeps_what_is_freed() -> None:
    """Blocks below 32 MB are served from what was freed: no pages are fetched for them a second time."""
    script = """
import resource, numpy as np
from mlx_trainer import _malloc
def fetched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (5, 6, 7, 9) * 4:
        np.empty(size << 20, np.uint8).fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
import ctypes
ctypes.CDLL(None).mallopt(-3, 1 << 17)  # as at the start: the threshold rises by itself to what was freed before
print(fetched(), _malloc.keep_freed(), fetched(), fetched())
"""
    first, kept, _, last = run(script)[0].split()
    assert kept == "True"
    assert int(last) < 0.1 * int(first)


@pytest.mark.parametrize(
    ("backend", "most", "limits"),
    [("cuda", 20_000, [20_000]), ("cuda", 0, [95_000]), ("metal", 20_000, []), ("cpu", 20_000, [])],
)
def test_queued_work_waits_on_cuda_alone(
    monkeypatch: pytest.MonkeyPatch, backend: str, most: int, limits: list[int]
) -> None:
    """While more is held than a step needs; where that is not known, while the card is full."""
    told: list[int] = []
    monkeypatch.setattr(runtime, "backend", lambda: backend)
    monkeypatch.setattr(runtime, "memory_limit_bytes", lambda: 100_000)
    monkeypatch.setattr(mx, "set_cache_limit", lambda bytes: None)
    monkeypatch.setattr(mx, "set_memory_limit", told.append)
    runtime.bound_memory(30_000, most)
    assert told == limits


def test_names() -> None:
    """The backend is one of three, follows the default device, and the device has a name."""
    assert runtime.backend() in ("metal", "cuda", "cpu")
    assert runtime.device_name()
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        assert runtime.backend() == "cpu"
    finally:
        mx.set_default_device(device)
