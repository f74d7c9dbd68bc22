"""Power cuts: what a real ext4 would hold, had the power gone just then.

A real run saves on a file system in a file. The file is copied, while the run stands still, just after a checkpoint was
told complete or at any moment in between; the copy has what was handed to the device by then, and nothing of what was
still in memory. Mounted, its journal replayed, it must hold the newest checkpoint that was told. Not tried: a drive
that says it has written what is only in a cache of its own.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_trainer.checkpoint import CheckpointStore, step_of, verify
from tests.faults.conftest import Tell

ROOT = Path(__file__).parent.parent.parent

RUN = """
import os, sys
from pathlib import Path
from mlx_trainer import LambdaCallback, ModelCheckpoint, Trainer
from tests.faults.test_storage import ToyLoader, Wide, toy_batches

log = open(Path(sys.argv[1]) / "log", "w")

def sync_something_else(trainer, module, step):  # without this, ext4 keeps back what was not synced, and harms nothing
    print(step, file=log, flush=True)
    os.fsync(log.fileno())

def tell(trainer, module, path):
    os.write(1, f"{path.name}\\n".encode())

callbacks = [LambdaCallback(on_step_end=sync_something_else, on_checkpoint_saved=tell),
             ModelCheckpoint(Path(sys.argv[1]), every=1, keep_last=2)]
Trainer(max_epochs=1_000_000, callbacks=callbacks).fit(Wide(), ToyLoader(toy_batches()))
"""


@contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[Path]:
    """The ext4 in the file `image`."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "ext4", "-o", f"loop,{options}", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty ext4 in a file, where this machine lets us mount one."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(24 << 20)
    try:
        if os.getuid() != 0:
            raise OSError
        subprocess.run(["mkfs.ext4", "-q", "-F", str(path)], check=True, capture_output=True)
        with mounted(path, tmp_path / "tried", "rw"):
            pass
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root, mkfs.ext4 and leave to mount a file")
    return path


def copied_at_once(image: Path, copy: Path) -> bool:
    """Copy the file; False where it changed meanwhile, since then the copy is of no one moment."""
    shutil.copy(image, copy)
    return copy.read_bytes() == image.read_bytes()


def cut(image: Path, copy: Path, options: str, wait: float, told: list[str], folder: Path) -> None:
    """Copy the file of a run that has told of another checkpoint, and `wait` seconds have passed; end the run."""
    with (
        mounted(image, folder, options),
        subprocess.Popen(
            [sys.executable, "-c", RUN, str(folder)], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
        ) as process,
    ):
        assert process.stdout is not None
        for _ in range(3):
            told.append(process.stdout.readline().decode().strip())
        time.sleep(wait)
        process.send_signal(signal.SIGSTOP)
        while not copied_at_once(image, copy):
            pass
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read().decode().split()


@pytest.mark.parametrize("options", ["data=ordered", "data=ordered,noauto_da_alloc"])
def test_the_newest_that_was_told_survives_a_power_cut(
    image: Path, tmp_path: Path, options: str, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """With ext4's help against programs that do not sync, and without."""
    rng, states = random.Random(13), campaign(2, 15)
    newer = 0
    for state in range(states):
        told: list[str] = []
        fresh, copy = shutil.copy(image, tmp_path / "fresh"), tmp_path / "copy"
        cut(fresh, copy, options, 0 if state % 2 == 0 else rng.uniform(0, 0.1), told, tmp_path / "run")
        with mounted(copy, tmp_path / "after", options) as after:
            store = CheckpointStore(after / "checkpoints")
            path = store.latest()
            assert path is not None
            verify(path)
            assert step_of(path) >= max(step_of(Path(name)) for name in told)
            newer += path.name not in told
            with store.held():
                assert {path.name for path in store.directory.iterdir()} - {".run", ".lock"} == {
                    path.name for path in store.list()
                }
            store.save(step_of(path) + 1, lambda directory: (directory / "content").write_text("goes on"))
    tell(
        f"{states} power cuts on ext4 with {options}",
        f"the newest checkpoint that was told was whole each time; {newer} times one that was not told yet",
    )
