"""CUDA C to PTX, by the compiler that MLX brings (NVRTC), and what runs it.

All kernels take a tenth of a second. MLX's own way to one (`mx.fast.cuda_kernel`) compiles its headers with it, 4
seconds for each in each process.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import mlx.core as mx

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
"""MLX has loaded one of them."""
OPTIONS = ("--gpu-architecture=compute_75", "--std=c++17")
"""The oldest GPUs that MLX runs on: the driver makes of PTX what the GPU has."""
TYPES = {mx.float32: "float", mx.bfloat16: "bfloat16", mx.float16: "float16"}
SOURCES = ("common.cu", "llama.cu", "adapters.cu")
ENTRY = b".visible .entry "
"""Before each kernel's name in PTX."""
THREADS = 256
"""Of a block."""

Output = tuple[Sequence[int], mx.Dtype]
"""The shape and the type of a result."""


class CompileError(RuntimeError):
    """The compiler's own words."""


@cache
def ptx_of(dtype: mx.Dtype) -> dict[str, bytes]:
    """All kernels, each by itself, for numbers of this type.

    Raises CompileError, and OSError where NVRTC is not there.
    """
    source = "\n".join(files(__package__).joinpath(name).read_text() for name in SOURCES)
    head, *kernels = compiled(source, [*OPTIONS, f"-DNUMBER={TYPES[dtype]}"]).split(ENTRY)
    return {kernel.partition(b"(")[0].decode(): head + ENTRY + kernel for kernel in kernels}


def compiled(source: str, options: Sequence[str]) -> bytes:
    """The PTX of `source`."""
    library, program = nvrtc(), ctypes.c_void_p()
    words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        if library.nvrtcCompileProgram(program, len(options), words):
            raise CompileError(told(library, program, "nvrtcGetProgramLog").decode())
        return told(library, program, "nvrtcGetPTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def told(library: Any, program: ctypes.c_void_p, name: str) -> bytes:
    """What the compiler's function `name` tells of `program`, without the zero at its end."""
    size = ctypes.c_size_t()
    getattr(library, f"{name}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, name)(program, text)
    return text.raw.rstrip(b"\0")


@cache
def nvrtc() -> Any:
    """The library; raises OSError."""
    for name in LIBRARIES[:-1]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return ctypes.CDLL(LIBRARIES[-1])


def run(
    name: str,
    dtype: mx.Dtype,
    inputs: Sequence[mx.array],
    outputs: Sequence[Output],
    scalars: Sequence[int | float | bool],
    threads: int,
) -> list[mx.array]:
    """The `outputs` of the kernel `name` for numbers of `dtype`, by so many `threads`; lazy, as all operations.

    Floating-point `scalars` are rounded to float32.
    """
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=ptx_of(dtype)[name],
        inputs=list(inputs),
        output_shapes=[tuple(shape) for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        scalars=[ctypes.c_float(x).value if type(x) is float else x for x in scalars],
        grid=(threads, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )
