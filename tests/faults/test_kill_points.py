"""SIGKILL before each system call, and each operation on files, of one save: the old or the new one is whole.

A real run in a process of its own resumes at step 1, takes step 2, saves it, removes step 1 and writes the result. It
is killed somewhere on the way. Then the run is continued, and must end as one that nobody disturbed.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer import ModelCheckpoint, Trainer
from mlx_trainer.checkpoint import CheckpointStore, verify
from tests.faults.conftest import Tell
from tests.toy import ToyLoader, ToyModule, toy_batches

ROOT = Path(__file__).parent.parent.parent
BEGIN = "the save begins"
CHANGING = "mkdir,mkdirat,openat,write,pwrite64,fsync,fdatasync,rename,renameat,unlink,unlinkat,rmdir,fallocate"

KILLING = f"""
import os, signal, sys
from pathlib import Path

folder, at, operations = Path(sys.argv[1]), int(sys.argv[2]), []

def killing(event, arguments):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "fsync", "os.listdir"):
        operations.append(event)
        if len(operations) == at:
            os.kill(os.getpid(), signal.SIGKILL)

def fsync(descriptor, call=os.fsync):
    killing("fsync", ())
    call(descriptor)

def begin(*_):
    os.mkdir(folder / {BEGIN!r})
    if at:
        os.fsync = fsync
        sys.addaudithook(killing)
"""

RUN = f"""{KILLING}
from mlx_trainer import LambdaCallback, ModelCheckpoint, Trainer
from tests.toy import ToyLoader, ToyModule, toy_batches

callbacks = [LambdaCallback(on_step_end=begin), ModelCheckpoint(folder, every=1, keep_last=1, background=False)]
Trainer(max_steps=2, resume="auto", callbacks=callbacks).fit(ToyModule(), ToyLoader(toy_batches()))
print(len(operations))
"""

SAVE_AGAIN = f"""{KILLING}
from mlx_trainer.checkpoint import CheckpointStore

store = CheckpointStore(folder, keep_last=1, run="a" * 32)
with store.held():
    begin()
    store.save(7, lambda directory: (directory / "content").write_text("new" * 1000))
print(len(operations))
"""


def fit(folder: Path, steps: int) -> Path:
    """Train up to `steps` in this process; where the newest checkpoint is."""
    saving = ModelCheckpoint(folder, every=1, keep_last=1)
    Trainer(max_steps=steps, resume="auto", callbacks=[saving]).fit(ToyModule(), ToyLoader(toy_batches()))
    path = saving.latest_checkpoint()
    assert path is not None
    return path


def tensors(path: Path) -> dict[str, Any]:
    """All that the safetensors files of a checkpoint hold."""
    loaded: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        loaded |= {f"{file.name}/{name}": bytes(memoryview(array)) for name, array in arrays.items()}
    return loaded


def start(folder: Path, at: int = 0, before: tuple[str, ...] = (), code: str = RUN) -> subprocess.CompletedProcess[str]:
    """The run in a process of its own."""
    command = [*before, sys.executable, "-c", code, str(folder), str(at)]
    return subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)


def check_killed(folder: Path, expected: dict[str, Any]) -> int:
    """After the kill: step 1 or 2 is the newest good one, and the run can be continued; the step."""
    store = CheckpointStore(folder / "checkpoints")
    path = store.latest()
    assert path is not None
    assert path.name in ("step-00000001", "step-00000002")
    last = fit(folder, 3)
    assert tensors(last) == expected
    assert {path.name for path in store.directory.iterdir()} == {".run", last.name}
    assert {path.name for path in folder.iterdir()} - {BEGIN} == {"checkpoints", "model"}
    verify(last)
    return int(path.name[-1])


@cache
def strace_is_there() -> bool:
    """Whether processes can be traced here."""
    strace = shutil.which("strace")
    return strace is not None and subprocess.run([strace, "true"], capture_output=True, check=False).returncode == 0


def points(log: Path) -> list[tuple[str, int]]:
    """The system calls of the main thread after the beginning of the save, each with its number among its like."""
    lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    main, numbers, found, begun = lines[0][0], Counter[str](), [], False
    for thread, text in lines:
        call = re.match(r"(\w+)\(", text)
        if thread == main and call is not None:
            numbers[call[1]] += 1
            if begun and (call[1] != "openat" or "O_CREAT" in text):
                found.append((call[1], numbers[call[1]]))
            begun = begun or BEGIN in text
    return found


def spread(things: list[Any], number: int) -> list[Any]:
    """So many of them, from the first to the last."""
    chosen = {round(i * (len(things) - 1) / max(1, number - 1)) for i in range(min(number, len(things)))}
    return [things[i] for i in sorted(chosen)]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run that has saved step 1."""
    fit(tmp_path / "begun", 1)
    shutil.rmtree(tmp_path / "begun" / "model")
    return tmp_path / "begun"


def test_killed_before_each_system_call(
    begun: Path, tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """By strace, as the kernel sees the save."""
    if not strace_is_there():
        pytest.skip("needs strace, and leave to trace")
    expected = tensors(fit(tmp_path / "undisturbed", 3))
    for trial in ("warm", "measured"):  # the first writes what Python keeps compiled
        folder, log = shutil.copytree(begun, tmp_path / trial), tmp_path / "strace.log"
        assert start(folder, before=("strace", "-f", "-o", str(log), "-e", f"trace={CHANGING}")).returncode == 0
    every = points(log)
    newest = Counter[int]()
    for name, number in spread(every, campaign(9, len(every))):
        folder = shutil.copytree(begun, tmp_path / "killed")
        inject = ("-e", f"trace={CHANGING}", "-e", f"inject={name}:signal=KILL:when={number}")
        process = start(folder, before=("strace", "-f", "-o", "/dev/null", *inject))
        assert process.returncode != 0, f"{name} {number} was not reached"
        assert (folder / BEGIN).exists(), f"{name} {number} came before the save"
        newest[check_killed(folder, expected)] += 1
        shutil.rmtree(folder)
    assert min(newest[1], newest[2]) > 0
    tell(
        f"SIGKILL before {newest.total()} of the {len(every)} system calls of one save, with retention and result",
        f"step 1 was the newest good one {newest[1]} times, step 2 {newest[2]} times; all continued bit for bit",
    )


def test_killed_before_each_operation(
    begun: Path, tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """By the process itself, as Python sees the save: where strace is not to be had, too."""
    expected = tensors(fit(tmp_path / "undisturbed", 3))
    operations = int(start(shutil.copytree(begun, tmp_path / "measured"), at=100_000).stdout)
    newest = Counter[int]()
    for number in spread(list(range(1, operations + 1)), campaign(9, operations)):
        folder = shutil.copytree(begun, tmp_path / "killed")
        assert start(folder, at=number).returncode == -9
        newest[check_killed(folder, expected)] += 1
        shutil.rmtree(folder)
    assert min(newest[1], newest[2]) > 0
    tell(
        f"SIGKILL before {newest.total()} of the {operations} operations on files of one save",
        f"step 1 was the newest good one {newest[1]} times, step 2 {newest[2]} times; all continued bit for bit",
    )


def test_killed_while_a_step_is_saved_again(tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell) -> None:
    """The only checkpoint is replaced by another one of the same step: between the two renames, too, none is lost."""
    store = CheckpointStore(tmp_path / "begun", keep_last=1, run="a" * 32)
    store.save(7, lambda directory: (directory / "content").write_text("old"))
    operations = int(start(shutil.copytree(store.directory, tmp_path / "all"), at=100_000, code=SAVE_AGAIN).stdout)
    held = Counter[str]()
    for number in spread(list(range(1, operations + 1)), campaign(9, operations)):
        folder = shutil.copytree(store.directory, tmp_path / "killed")
        assert start(folder, at=number, code=SAVE_AGAIN).returncode == -9
        killed = CheckpointStore(folder, keep_last=1)
        with killed.held():
            assert killed.latest() == folder / "step-00000007"
            held[(folder / "step-00000007" / "content").read_text()[:3]] += 1
        killed.save(8, lambda directory: (directory / "content").write_text("next"))
        assert killed.latest() == folder / "step-00000008"
        shutil.rmtree(folder)
    assert set(held) == {"old", "new"}
    tell(
        f"SIGKILL before {held.total()} of the {operations} operations of saving a step again",
        f"the old one was whole {held['old']} times, the new one {held['new']} times",
    )
