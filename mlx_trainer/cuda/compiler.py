"""CUDA C to programs, by the compiler that MLX brings (NVRTC), and what runs them.

All kernels take a fifth of a second. MLX's own way to one (`mx.fast.cuda_kernel`) compiles its headers with it, 4
seconds for each in each process.
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

log = logging.getLogger("mlx_trainer.cuda")

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
"""MLX has loaded one of them."""
TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.float16: "float16"}
FILES = {
    "take_rows": "rows.cu",
    "take_heads": "rows.cu",
    "swiglu": "swiglu.cu",
    "swiglu_gradient": "swiglu.cu",
    "join_columns": "columns.cu",
    "split_columns": "columns.cu",
    "join": "many.cu",
    "adamw": "many.cu",
}
"""Where each kernel stands; `common.cu` is before all of them."""
THREADS = 256
"""Of a block."""
VECTOR_BYTES = 16
"""Moved at once."""

Kind = Literal["PTX", "CUBIN"]
"""For all GPUs that MLX runs on, which a driver older than the compiler may refuse, and for the one that is here."""
Output = tuple[Sequence[int], mx.Dtype]
"""The shape and the type of a result."""


class CompileError(RuntimeError):
    """The compiler's own words."""


def run(
    name: str,
    dtype: mx.Dtype,
    inputs: Sequence[mx.array],
    outputs: Sequence[Output],
    scalars: Sequence[int | float | bool],
    threads: int,
    kind: Kind | None = None,
) -> list[mx.array]:
    """The `outputs` of the kernel `name` for numbers of `dtype`, by so many `threads`; lazy, as all operations.

    Floating-point `scalars` are rounded to float32. The program is of the kind that works here, unless one is named.
    """
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=program(FILES[name], dtype, kind or working_kind(dtype) or "PTX"),
        inputs=list(inputs),
        output_shapes=[tuple(shape) for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        scalars=[ctypes.c_float(x).value if type(x) is float else x for x in scalars],
        grid=(threads, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )


@cache
def working_kind(dtype: mx.Dtype) -> Kind | None:
    """The kind of program that runs here, for numbers of this type; None, and a warning, where none does."""
    first, second = [list(map(float, range(begin, begin + 8))) for begin in (0, 8)]
    x, index = mx.array([first, second], dtype), mx.array([1, 1, 0], mx.int32)
    kinds: tuple[Kind, ...] = ("PTX", "CUBIN")
    for kind in kinds:
        try:
            vectors = 8 * dtype.size // VECTOR_BYTES
            (taken,) = run("take_rows", dtype, [x, index], [((3, 8), dtype)], [3, vectors], 3 * vectors, kind)
            if taken.tolist() == [second, second, first]:  # not with `x[index]`, for which MLX would compile a kernel
                return kind
            problem: Exception | str = "they compute something else"
        except (OSError, RuntimeError) as error:
            problem = error
    log.warning("Training without this package's CUDA kernels, which is slower: %s", problem)
    return None


@cache
def program(file: str, dtype: mx.Dtype, kind: Kind) -> bytes:
    """The kernels of `file` for numbers of this type.

    Raises CompileError, and OSError where NVRTC is not there.
    """
    source = "\n".join(Path(__file__).with_name(name).read_text() for name in ("common.cu", file))
    architecture = mx.device_info()["architecture"] if kind == "CUBIN" else "compute_75"
    options = [f"--gpu-architecture={architecture}", "--std=c++17", f"-DNUMBER={TYPES[dtype]}"]
    return compiled(source, options, kind)


def compiled(source: str, options: Sequence[str], kind: Kind) -> bytes:
    """The program of `source`."""
    library, handle = nvrtc(), ctypes.c_void_p()
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    library.nvrtcCreateProgram(ctypes.byref(handle), source.encode(), b"kernels.cu", 0, None, None)
    try:
        if library.nvrtcCompileProgram(handle, len(options), words):
            raise CompileError(told(library, handle, "nvrtcGetProgramLog").rstrip(b"\0").decode())
        return told(library, handle, f"nvrtcGet{kind}")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(handle))


def told(library: Any, handle: ctypes.c_void_p, name: str) -> bytes:
    """What the compiler's function `name` tells of a program."""
    size = ctypes.c_size_t()
    getattr(library, f"{name}Size")(handle, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, name)(handle, text)
    return text.raw


@cache
def nvrtc() -> Any:
    """The library; raises OSError."""
    for name in LIBRARIES[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(LIBRARIES[-1])
