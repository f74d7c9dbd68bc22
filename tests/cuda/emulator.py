"""The CUDA kernels on a CPU: g++ compiles the same sources, and each thread of a launch is a call."""

import ctypes
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.cuda import kernels
from mlx_trainer.cuda.compiler import FILES, TYPES

COMPILER = shutil.which("g++")
DEVICE = """
#include <cmath>
#include <cstring>
#define __device__
#define __global__
struct Index { unsigned x; };
static Index blockIdx, blockDim = {1}, threadIdx;
extern "C" void set_thread(unsigned i) { blockIdx.x = i; }
static inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
#define __expf(x) std::exp(x)
"""
HALVES = """
inline float wide(float16 x) { _Float16 half; std::memcpy(&half, &x, 2); return half; }
inline void narrow(float x, float16& result) { _Float16 half = x; std::memcpy(&result, &half, 2); }
"""


@cache
def library(dtype: mx.Dtype) -> Any:
    """The kernels for numbers of this type."""
    names = ["common.cu", *dict.fromkeys(FILES.values())]
    common, *others = [files("mlx_trainer.cuda").joinpath(name).read_text() for name in names]
    folder = Path(mkdtemp(prefix="kernels-"))
    source = folder / "kernels.cpp"
    source.write_text("\n".join([DEVICE, common, HALVES, *others]))
    command = [str(COMPILER), "-O1", "-std=c++17", "-shared", "-fPIC", f"-DNUMBER={TYPES[dtype]}", str(source)]
    subprocess.run([*command, "-o", str(folder / "kernels.so")], check=True)
    loaded = ctypes.CDLL(str(folder / "kernels.so"))
    shutil.rmtree(folder)
    return loaded


def run(
    name: str,
    dtype: mx.Dtype,
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
    scalars: Sequence[int | float | bool],
    threads: int,
) -> list[mx.array]:
    """What `compiler.run` does, at once; a launch is rounded up to whole blocks, so that some threads are too many."""
    mx.eval(list(inputs))
    taken = [np.ascontiguousarray(bits(x)) for x in inputs]
    made = [np.full(math.prod(shape) * kind.size + GUARD, 0xA5, np.uint8) for shape, kind in outputs]
    constants = [CONSTANTS[type(scalar)](scalar) for scalar in scalars]
    loaded = library(dtype)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in [*taken, *made]]
    for thread in range(-(-threads // 256) * 256):
        loaded.set_thread(thread)
        getattr(loaded, name)(*pointers, *constants)
    assert all((array[-GUARD:] == 0xA5).all() for array in made), f"{name} writes beyond its results"
    return [
        mx.array(array[:-GUARD]).view(kind).reshape(shape) for array, (shape, kind) in zip(made, outputs, strict=True)
    ]


GUARD = 16
"""Bytes behind each result, which no thread may write."""
CONSTANTS: dict[type, Any] = {bool: ctypes.c_bool, int: ctypes.c_int, float: ctypes.c_float}


def bits(x: mx.array) -> Any:
    """The array's memory for NumPy, which does not know bfloat16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package's functions use the kernels, as they do on CUDA; nothing may be compiled by MLX then."""
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("the kernels are compiled by g++, which is not here")
    monkeypatch.setattr(kernels, "run", run)
    monkeypatch.setattr(kernels, "usable", fits)


def fits(dtype: mx.Dtype, *widths: int) -> bool:
    """`kernels.usable` where there is a GPU."""
    return dtype in TYPES and all(width * dtype.size % kernels.VECTOR_BYTES == 0 for width in widths)
