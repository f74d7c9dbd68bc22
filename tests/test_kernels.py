"""MLX's folder of compiled kernels in a temporary folder that others share: nothing that they planted is loaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_trainer import runtime
from mlx_trainer._kernels import is_private, private_temporary

STRANGER = 65534
COMPUTE = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + mx.sin(x))(mx.ones(7)))
"""
PLANTED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("CANARY"), "w")); }
"""
as_root = pytest.mark.skipif(os.getuid() != 0, reason="a folder of another user's needs root")


def compute(program: str, temporary: Path, cache: Path) -> Path:
    """Compile a kernel in a fresh process with this temporary folder, and return the canary, which may be there."""
    canary = temporary.parent / "canary"
    canary.unlink(missing_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "MLX_TRAINER_CACHE": str(cache), "CANARY": str(canary)}
    subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        check=False,
    )
    return canary


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU's kernels are compiled on Linux")
@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles no kernel without g++")
@as_root
def test_a_planted_kernel_is_not_loaded(tmp_path: Path) -> None:
    """MLX alone runs the code of another user's library under the kernel's name; with this package it does not."""
    shared = tmp_path / "shared"
    shared.mkdir()
    compute(COMPUTE, shared, tmp_path / "cache")
    kernels = list(shared.glob("mlx/*/cpu/*.so"))
    assert len(kernels) == 1
    (tmp_path / "planted.c").write_text(PLANTED)
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", kernels[0], tmp_path / "planted.c"], check=True)
    for path in (shared, *shared.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    assert compute(COMPUTE, shared, tmp_path / "cache").exists()
    assert not compute("import mlx_trainer" + COMPUTE, shared, tmp_path / "cache").exists()
    assert list((tmp_path / "cache/kernels/mlx").glob("*/cpu/*.so")) != []


def test_a_folder_of_ones_own_is_kept(tmp_path: Path) -> None:
    """It is made for this user alone, stays where nobody else can write, and a program's own folder is not moved."""
    assert is_private(tmp_path)
    assert (tmp_path / "mlx").stat().st_mode & 0o777 == 0o700
    (tmp_path / "mlx/0.32.4/cpu").mkdir(parents=True)
    assert is_private(tmp_path)


@pytest.mark.parametrize("place", [".", "mlx", "mlx/0.32.4", "mlx/0.32.4/cpu"])
def test_a_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """On any level; the user's cache stands in, and where others can write there too, a new folder."""
    shared, own = tmp_path / "shared", tmp_path / "own"
    (shared / "mlx/0.32.4/cpu").mkdir(parents=True, mode=0o755)
    (shared / place).chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(shared))
    assert private_temporary(own) == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    (own / "mlx").chmod(0o777)
    new = private_temporary(own)
    assert new is not None
    assert new not in (str(own), str(shared))
    assert is_private(Path(new))


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """Whoever made it decides where it leads tomorrow."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mlx").symlink_to(tmp_path / "elsewhere")
    assert not is_private(tmp_path)


def test_other_programs_get_the_temporary_folder_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was set before the package set it is given back, and what was not set is not there."""
    monkeypatch.setattr(runtime, "_set_here", {})
    monkeypatch.setenv("TMPDIR", "/before")
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER", raising=False)
    for name, value in (("TMPDIR", "/ours"), ("TMPDIR", "/again"), ("MLX_MAX_MB_PER_BUFFER", "100")):
        runtime._set(name, value)
    foreign = runtime.foreign_environment()
    assert os.environ["TMPDIR"] == "/again"
    assert (foreign["TMPDIR"], "MLX_MAX_MB_PER_BUFFER" in foreign) == ("/before", False)
    monkeypatch.delenv("MLX_MAX_MB_PER_BUFFER")
