"""Kernels are compiled by NVRTC, and where there is none, training goes on without them."""

import ctypes
import importlib.util
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer.cuda import compiler, kernels
from mlx_trainer.cuda.compiler import FILES, CompileError, compiled, nvrtc, program


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
@pytest.mark.parametrize("file", sorted(set(FILES.values())))
def test_each_file_is_compiled(file: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one GPU and for all, with the names that its kernels are launched by; their arrays stay in registers."""
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90"})
    names = {name for name, own in FILES.items() if own == file}
    for_all, for_one = (program.__wrapped__(file, dtype, kind) for kind in ("PTX", "CUBIN"))
    assert {name.decode() for name in re.findall(rb"\.visible \.entry (\w+)\(", for_all)} == names
    assert b".local" not in for_all
    assert for_one.startswith(b"\x7fELF")
    assert all(name.encode() in for_one for name in names)


@pytest.mark.usefixtures("library")
def test_an_error_is_told_in_the_compilers_words() -> None:
    """Where it is, and what is wrong."""
    with pytest.raises(CompileError, match=r'(?s)kernels.cu\(1\): error: .*"nowhere" is undefined'):
        compiled("__global__ void kernel() { nowhere(); }", [], "PTX")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with CUDA, of which nothing is known yet."""
    monkeypatch.setattr("mlx_trainer.runtime.backend", lambda: "cuda")
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90"})
    for name in ("nvrtc", "program", "working_kind"):
        monkeypatch.setattr(compiler, name, cache(getattr(compiler, name).__wrapped__))
    monkeypatch.setattr(kernels, "working_kind", compiler.working_kind)


@pytest.mark.usefixtures("fresh")
def test_without_the_compiler_nothing_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and MLX's own operations do the work."""
    monkeypatch.setattr(compiler, "LIBRARIES", ("libnowhere.so.1", "libnowhere.so.2"))
    with caplog.at_level(logging.WARNING):
        assert not kernels.usable(mx.float32, 8)
        assert not kernels.usable(mx.float32, 4)
    (message,) = caplog.messages
    assert message.startswith("Training without this package's CUDA kernels, which is slower: libnowhere.so.2: ")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("fails", "kind"), [((), "PTX"), (("PTX",), "CUBIN"), (("PTX", "CUBIN"), None)])
@pytest.mark.parametrize("by_error", [True, False])
def test_the_first_kind_that_works_is_used(
    fails: tuple[str, ...],
    kind: str | None,
    by_error: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One that the driver does not load, or that computes something else, is not."""
    monkeypatch.setattr(compiler, "program", lambda file, dtype, kind: kind.encode())

    def launch(*, compiled_source: bytes, inputs: list[mx.array], **rest: Any) -> list[mx.array]:
        if compiled_source.decode() not in fails:
            return [inputs[0][inputs[1]]]
        if by_error:
            raise RuntimeError("Failed to load compiled take_rows kernel: no.")
        return [inputs[0][inputs[1]] + 1]

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    with caplog.at_level(logging.WARNING):
        assert compiler.working_kind(mx.bfloat16) == kind
    reason = "Failed to load compiled take_rows kernel: no." if by_error else "they compute something else"
    told = [f"Training without this package's CUDA kernels, which is slower: {reason}"]
    assert caplog.messages == ([] if kind else told)


def test_elsewhere_nothing_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is even compiled, whatever would fit."""
    monkeypatch.setattr("mlx_trainer.runtime.backend", lambda: "cpu")
    monkeypatch.setattr(kernels, "working_kind", lambda dtype: pytest.fail("compiled for nothing"))
    assert not kernels.usable(mx.float32, 8)


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [(mx.bfloat16, 8, True), (mx.bfloat16, 12, False), (mx.float32, 12, True), (mx.int32, 8, False)],
)
def test_widths_that_fit(dtype: mx.Dtype, width: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bytes, and floating-point numbers that there is a kernel for."""
    monkeypatch.setattr("mlx_trainer.runtime.backend", lambda: "cuda")
    monkeypatch.setattr(kernels, "working_kind", lambda dtype: "PTX")
    assert kernels.usable(dtype, 16, width) is fits
