"""Kernels are compiled by NVRTC, and where there is none, training goes on without them."""

import ctypes
import importlib.util
import logging
import re
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer.cuda import compiler, kernels
from mlx_trainer.cuda.compiler import CompileError, compiled, nvrtc, ptx_of

NAMES = {"take_rows", "take_heads", "swiglu", "swiglu_gradient", "join_columns", "split_columns", "join", "adamw"}


@pytest.fixture
def library() -> None:
    """NVRTC, loaded as MLX for CUDA loads it."""
    found = importlib.util.find_spec("nvidia")
    for folder in (found.submodule_search_locations or []) if found else []:
        for path in Path(folder).glob("*/lib/libnvrtc.so.1?"):
            ctypes.CDLL(str(path))
    try:
        nvrtc()
    except OSError:
        pytest.skip("NVRTC is not here: nvidia-cuda-nvrtc, in the extra interop, brings it for Linux")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_each_kernel_is_a_program_of_its_own(dtype: mx.Dtype) -> None:
    """With the name that it is launched by; and none keeps arrays of its own in memory, which would be slow."""
    programs = ptx_of(dtype)
    assert programs.keys() == NAMES
    for name, program in programs.items():
        assert re.findall(rb"\.visible \.entry (\w+)\(", program) == [name.encode()]
        assert b".version" in program
        assert b".local" not in program


@pytest.mark.usefixtures("library")
def test_an_error_is_told_in_the_compilers_words() -> None:
    """Where it is, and what is wrong."""
    with pytest.raises(CompileError, match=r'(?s)kernels.cu\(1\): error: .*"nowhere" is undefined'):
        compiled("__global__ void kernel() { nowhere(); }", compiler.OPTIONS)


def test_without_the_compiler_nothing_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On CUDA: it is said once, and MLX's own operations do the work."""
    monkeypatch.setattr(compiler, "LIBRARIES", ("libnowhere.so.1", "libnowhere.so.2"))
    monkeypatch.setattr("mlx_trainer.runtime.backend", lambda: "cuda")
    for cached in (compiler.nvrtc, compiler.ptx_of, kernels.built):
        cached.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert not kernels.usable(mx.float32, 8)
            assert not kernels.usable(mx.float32, 4)
        (message,) = caplog.messages
        assert message.startswith("Training without this package's CUDA kernels, which is slower: libnowhere.so.2: ")
    finally:
        for cached in (compiler.nvrtc, compiler.ptx_of, kernels.built):
            cached.cache_clear()


def test_elsewhere_nothing_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is even compiled, whatever would fit."""
    monkeypatch.setattr("mlx_trainer.runtime.backend", lambda: "cpu")
    monkeypatch.setattr(kernels, "built", lambda dtype: pytest.fail("compiled for nothing"))
    assert not kernels.usable(mx.float32, 8)


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [(mx.bfloat16, 8, True), (mx.bfloat16, 12, False), (mx.float32, 12, True), (mx.int32, 8, False)],
)
def test_widths_that_fit(dtype: mx.Dtype, width: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bytes, and floating-point numbers that there is a kernel for."""
    monkeypatch.setattr("mlx_trainer.runtime.backend", lambda: "cuda")
    monkeypatch.setattr(kernels, "built", lambda dtype: True)
    assert kernels.usable(dtype, 16, width) is fits
