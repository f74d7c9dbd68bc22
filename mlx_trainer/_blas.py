"""An optimized BLAS under MLX on Linux CPUs: found, loaded and put in the place of the reference one.

The `mlx-cpu` wheel carries Netlib's reference BLAS (about 4 GFLOP/s on two cores where OpenBLAS gives 200). Its
`libmlx.so` calls `cblas_sgemm` and two siblings through slots that the dynamic loader fills; `use` fills them anew.
Four ways were tried:

- `RTLD_GLOBAL` before `mlx.core`, so that the loader finds the fast one first: import order decides,
  since Python binds a library's calls when it loads it, and `import mlx.core` sorts before `import mlx_trainer`. It
  also shows every name in the library to all others. The OpenBLAS that pip installs (`scipy-openblas32`) puts a
  prefix on its names, so it needs a shim besides.
- A C shim that supplies the plain names: needs a compiler, and a cache kept safe from other users and processes.
- The shim as a shared object without code, made in memory, its symbols absolute addresses: works, import order remains.
- The slots: any order, nothing on disk, no compiler, no processor-specific code. What could go wrong is checked before
  a write: the tables are those that the loader itself reads, a slot must hold the address that the loader would give
  it, and its page is made writable first, should a later wheel bind its slots read-only.

LAPACK routines (`mx.linalg`) stay with the wheel's own library. Tried on x86-64; 64-bit ELF is the same on aarch64.
"""

import ctypes
import importlib.util
import mmap
import os
import struct
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

GEMM_SYMBOLS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
"""Everything that `libmlx.so` takes from a BLAS (`nm -D libmlx.so`, mlx 0.32)."""

VARIABLE = "MLX_TRAINER_BLAS"
OFF = ("off", "0", "none", "false")
threads_used = 1
"""How many threads a product has, 0 where a BLAS does not tell; the reference BLAS has one."""
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
_SLOW = "the reference BLAS of the MLX wheel, tens of times slower in matrix products"


def load(threads: int) -> str:
    """Put an optimized BLAS under MLX, give it so many threads, and return one line that says what was done."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in OFF:
        return f"BLAS: switched off by {VARIABLE}={wanted}; {_SLOW}"
    refused = []
    for path, origin in [(wanted, VARIABLE)] if wanted else _candidates():
        try:
            return f"BLAS: {use(path, origin, threads)}"
        except (OSError, AttributeError) as error:
            refused.append(f"{path}: {error}")
    if wanted:
        warnings.warn(f"{VARIABLE} names no usable BLAS: {refused[0]}", RuntimeWarning, stacklevel=2)
    reason = f" ({'; '.join(refused)})" if refused else ""
    return f"BLAS: {_SLOW}{reason}; `pip install scipy-openblas32` brings a fast one"


def _candidates() -> Iterator[tuple[str, str]]:
    """Yield (path, where it comes from) of the libraries that are installed, best first."""
    spec = importlib.util.find_spec("scipy_openblas32")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from ((str(path), "scipy-openblas32") for path in Path(folder, "lib").glob("libscipy_openblas*.so*"))
    # Slow to import and to ask (it runs ldconfig), so only where the package above is missing.
    from ctypes.util import find_library

    if name := find_library("openblas"):
        yield name, "system"


def use(path: str, origin: str, threads: int) -> str:
    """Let MLX call the library's matrix products; raise OSError or AttributeError where that cannot be done."""
    library = ctypes.CDLL(path)
    prefix = "" if hasattr(library, GEMM_SYMBOLS[0]) else "scipy_"
    replacements = {name: _address(library, prefix + name) for name in GEMM_SYMBOLS}
    # Found by its soname, since it is loaded; `import mlx.core` has done that wherever the file lies.
    mlx = ctypes.CDLL("libmlx.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    wanted = (pair for pair in imported_slots(mlx) if pair[0] in replacements)
    slots = list(islice(wanted, len(replacements)))
    if {name for name, _ in slots} != replacements.keys():
        raise OSError("this build of MLX has its BLAS inside")
    if any(ctypes.c_size_t.from_address(slot).value != _address(mlx, name) for name, slot in slots):
        return "left as it is, since another one than MLX's own was loaded before"
    for name, slot in slots:
        _write(slot, replacements[name])
    return _tune(library, prefix, threads, origin, path)


def _tune(library: ctypes.CDLL, prefix: str, threads: int, origin: str, path: str) -> str:
    """Set the number of threads unless the environment does, and describe the library."""
    global threads_used
    if not hasattr(library, prefix + "openblas_get_config"):
        threads_used = 0
        return f"{path} ({origin})"
    config = library[prefix + "openblas_get_config"]
    config.restype = ctypes.c_char_p
    if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        library[prefix + "openblas_set_num_threads"](threads)
    threads_used = int(library[prefix + "openblas_get_num_threads"]())
    version = " ".join(config().decode().split()[:2])
    return f"{version} ({origin}), {threads_used} thread{'s' if threads_used != 1 else ''}"


class _LinkMap(ctypes.Structure):
    """The public head of glibc's `struct link_map` (link.h); a handle of `dlopen` points to one."""

    _fields_ = (("base", ctypes.c_size_t), ("name", ctypes.c_char_p), ("dynamic", ctypes.c_size_t))


# Tags of the dynamic section (System V ABI, chapter 5): where the tables are, and their sizes in bytes.
_NULL, _STRINGS, _SYMBOLS = 0, 5, 6
_RELOCATION_TABLES = ((23, 2), (7, 8))  # DT_JMPREL and DT_PLTRELSZ for calls, DT_RELA and DT_RELASZ for data


def imported_slots(library: ctypes.CDLL) -> Iterator[tuple[str, int]]:
    """Yield (symbol, address of a slot that holds its address) for all that a loaded library takes from others.

    The layouts are those of 64-bit ELF: `Elf64_Rela` (offset, symbol number and type, addend) and `Elf64_Sym`. Slots
    of calls come first, 800 of them in MLX; the other 3,900 cost 10 ms, so stop when you have what you want.
    """
    link = _LinkMap.from_address(library._handle)
    tables = dict(_dynamic_section(link.dynamic))
    # glibc has made these entries addresses; other loaders leave them relative to the library's base.
    address = {tag: value if value >= link.base else value + link.base for tag, value in tables.items()}
    for table, size in _RELOCATION_TABLES:
        entries = ctypes.string_at(address[table], tables[size]) if table in tables else b""
        for offset, information, _ in struct.iter_unpack("<QQq", entries):
            if symbol := information >> 32:
                name = ctypes.c_uint32.from_address(address[_SYMBOLS] + 24 * symbol).value
                yield ctypes.string_at(address[_STRINGS] + name).decode(), link.base + offset


def _dynamic_section(at: int) -> Iterator[tuple[int, int]]:
    while (tag := ctypes.c_int64.from_address(at).value) != _NULL:
        yield tag, ctypes.c_size_t.from_address(at + 8).value
        at += 16


def _write(slot: int, value: int) -> None:
    """Store an address in a slot, whose page may be read-only; one aligned store, so safe beside other threads."""
    page = slot - slot % mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE):
        raise OSError(ctypes.get_errno(), "MLX's table of imported functions cannot be written")
    ctypes.c_size_t.from_address(slot).value = value


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(library[name], ctypes.c_void_p).value or 0
