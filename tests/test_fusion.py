"""Kernels that are not compiled: what the step adds to the optimizer's own arithmetic needs none."""

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer import runtime
from mlx_trainer.fusion import all_finite, cast, on_its_own, spread

ROOT = Path(__file__).parent.parent

counts_kernels = pytest.mark.skipif(
    runtime.backend() != "cpu" or sys.platform != "linux" or shutil.which("g++") is None,
    reason="kernels are counted where MLX keeps those that g++ compiled: on a Linux CPU",
)


def kernels(tmp_path: Path, code: str) -> list[list[str]]:
    """The names of the kernels that each `told()` of a fresh process adds; what is compiled is there from the start."""
    start = """
import os
from pathlib import Path
import mlx.core as mx
import mlx_trainer
known = set()
def told():
    new = {p.name for p in Path(os.environ["TMPDIR"]).rglob("*.so")} - known
    known.update(new)
    print(*sorted(new), sep="\\t")
"""
    environment = {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    command = [sys.executable, "-c", start + code]
    out = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [[name for name in line.split("\t") if name] for line in out.splitlines()]


@counts_kernels
def test_what_is_on_its_own_is_not_compiled(tmp_path: Path) -> None:
    """A scaled array and a check for NaN need a kernel each if written plainly, and none as they are here."""
    code = """
from mlx_trainer.fusion import all_finite, cast, spread
x, s = mx.arange(6.0).reshape(2, 3), mx.array(2.0)
mx.eval(mx.compile(lambda x, s: ((x * s).astype(mx.float16), mx.isfinite(s)))(x, s)); told()
mx.eval(mx.compile(lambda x, s: (cast(x * spread(s, x), mx.float16), all_finite(s, s)))(x, s)); told()
"""
    plain, ours = kernels(tmp_path, code)
    assert (len(plain), ours) == (2, [])


@counts_kernels
def test_an_update_by_adamw_compiles_one_kernel(tmp_path: Path) -> None:
    """Averaging, norm, clipping, guards and what the learning rate is made of are MLX's own kernels.

    The loss is products alone. Of one kernel MLX makes two on a CPU, for gradients that are transposed and for others.
    """
    code = """
import mlx.nn as nn
from mlx_trainer import GradientClipping, LossOutput, NaNGuard, TrainerModule
from mlx_trainer.optim import build_optimizer
from mlx_trainer.step import TrainStep
class Products(TrainerModule):
    def __init__(self):
        self.model = nn.Module()
        self.model.a, self.model.b, self.model.c = mx.ones((4, 3)), mx.ones((3, 2)), mx.ones((2, 5))
    def training_loss(self, x):
        m = self.model
        return LossOutput((x @ m.a @ m.b @ m.c).sum(), x.sum())
module = Products()
optimizer = build_optimizer("adamw", 1e-3, schedule="cosine", total_steps=100, warmup_steps=5, minimum_ratio=0.1)
optimizer.init(module.model.trainable_parameters())
clip, guard = GradientClipping(), NaNGuard()
guards = {"clip": clip.accept_update, "nan": guard.accept_update}
step = TrainStep(module, optimizer, 1, [clip.transform_gradients], guards)
output = step([mx.ones((2, 4))])
mx.eval(output.values, output.verdicts, output.learning_rate, module.model.parameters(), optimizer.state)
assert all(verdict.item() for verdict in output.verdicts.values())
told()
"""
    ((*built,),) = kernels(tmp_path, code)
    assert len({name.rpartition("_")[0] for name in built}) == 1, built
    assert all("Select" in name for name in built), built


@pytest.mark.parametrize("dtype", [mx.bool_, mx.bfloat16, mx.uint32, mx.float32, mx.uint64])
def test_values_stay_as_they_are(dtype: mx.Dtype) -> None:
    """Whatever is left on its own, or spread, is the same, compiled or not."""
    x = mx.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
    for function in (on_its_own, mx.compile(on_its_own)):
        assert (function(x).dtype, function(x).tolist()) == (dtype, x.tolist())
        assert function(x.T).tolist() == x.T.tolist()
    for function in (spread, mx.compile(spread)):
        assert function(x[1, 2], x).tolist() == mx.full(x.shape, x[1, 2]).tolist()


def test_what_has_the_type_is_not_cast() -> None:
    """And what has not is, compiled or not."""
    x = mx.random.normal((5, 7))
    assert cast(x, mx.float32) is x
    assert mx.compile(lambda x: cast(x, mx.bfloat16))(x).tolist() == x.astype(mx.bfloat16).tolist()


@pytest.mark.parametrize(
    ("values", "expected"), [([1.0, -3e38], True), ([1.0, mx.nan], False), ([mx.inf, 1.0], False), ([-mx.inf], False)]
)
def test_one_value_that_is_not_finite_is_enough(values: list[float], expected: bool) -> None:
    """And infinities of both signs do not cancel."""
    assert all_finite(*(mx.array(value) for value in values)).item() is expected
    assert not all_finite(mx.array(mx.inf), mx.array(-mx.inf)).item()
