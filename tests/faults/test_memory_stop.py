"""Memory that runs out, in real processes under `ulimit -v`: stopped in order, or killed; resumed bit for bit."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import Tell

PROGRAM = """
import hashlib, resource, sys
import mlx.core as mx
import psutil
from mlx.utils import tree_flatten
from mlx_trainer import LambdaCallback, MemoryMonitor, ModelCheckpoint, Trainer
from tests.toy import ToyLoader, ToyModule, toy_batches

kind, folder, room_mb = sys.argv[1], sys.argv[2], int(sys.argv[3])
kept = []

def hold_more(trainer, module, step):
    if trainer.state.step >= 12:  # 20 MB a step, as a list of losses that nobody reads would
        kept.append(mx.ones((5_000_000,)))
        mx.eval(kept)

callbacks = [ModelCheckpoint(folder, every=5, background=False)]
if kind != "whole":
    callbacks.append(LambdaCallback(on_step_start=hold_more))
if kind in ("stopped", "killed"):
    mx.eval(mx.ones(10) + 1)  # threads and libraries are there by now
    mapped = psutil.Process().memory_info().vms
    limit = mapped + (room_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    percent = 100 * (1 - (room_mb << 19) / limit)  # half of the room
    callbacks.append(MemoryMonitor(stop_percent=percent if kind == "stopped" else None, sample_every_s=0.002))
trainer = Trainer(max_steps=60, seed=3, callbacks=callbacks, resume="auto")
module = ToyModule()
result = trainer.fit(module, ToyLoader(toy_batches()))
arrays = tree_flatten({"model": module.model.parameters(), "optimizer": trainer.optimizer.state})
digest = hashlib.sha256()
for name, array in sorted(arrays):
    digest.update(name.encode() + bytes(memoryview(array)))
print(result.steps, digest.hexdigest(), result.stop_reason)
"""
ROOT = Path(__file__).parents[2]


def run(kind: str, folder: Path, room_mb: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run the program in a fresh process."""
    command = [sys.executable, "-c", PROGRAM, kind, str(folder), str(room_mb)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return steps and digest of the run that nothing disturbs."""
    done = run("whole", tmp_path_factory.mktemp("whole"))
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[:2]


linux = pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is enforced on Linux alone")


@linux
def test_a_run_that_fills_the_memory_stops_in_order(
    tmp_path: Path, whole: list[str], campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """Well before the limit it ends with a checkpoint of its last step and a reason; resumed, it is the same run."""
    rooms = [400, 600, 800, 1000][: campaign(1, 4)]
    for room_mb in rooms:
        folder = tmp_path / str(room_mb)
        done = run("stopped", folder, room_mb)
        assert done.returncode == 0, done.stderr
        steps, _, reason = done.stdout.split(maxsplit=2)
        assert 12 < int(steps) < 60
        assert reason.startswith("memory: ")
        assert "smaller batches" in reason
        assert (folder / f"checkpoints/step-{int(steps):08d}/manifest.json").exists()
        resumed = run("whole", folder)
        assert resumed.stdout.split()[:2] == whole, resumed.stderr
    tell("memory runs out, stop_percent set", f"{len(rooms)} of {len(rooms)} stopped in order and resumed bit for bit")


@linux
def test_a_run_that_is_killed_for_want_of_memory_resumes(
    tmp_path: Path, whole: list[str], campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """An allocation beyond the limit ends the process at once; resumed from its last checkpoint, it is the same run."""
    rooms = [150, 250, 350, 450, 550][: campaign(1, 5)]
    for room_mb in rooms:
        folder = tmp_path / str(room_mb)
        done = run("killed", folder, room_mb)
        assert done.returncode in (-signal.SIGSEGV, -signal.SIGABRT, 1), (done.returncode, done.stderr)
        assert sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
        resumed = run("whole", folder)
        assert resumed.stdout.split()[:2] == whole, resumed.stderr
    tell("memory runs out, process killed", f"{len(rooms)} of {len(rooms)} resumed bit for bit")
