"""Disks that are full, broken, or not to be written: a CheckpointError says so, and the older checkpoint is whole."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_trainer import Callback, LambdaCallback, ModelCheckpoint, Trainer
from mlx_trainer.checkpoint import CheckpointError, CheckpointStore, verify
from tests.faults.conftest import Tell
from tests.toy import FEATURES, ToyLoader, ToyModule, toy_batches

ROOT = Path(__file__).parent.parent.parent
PAGE = 4096


class Wide(ToyModule):
    """Enough parameters for a checkpoint of several pages."""

    def setup(self, stage: str) -> None:
        if not hasattr(self, "model"):
            mx.random.seed(7)
            self.model = nn.Sequential(nn.Linear(FEATURES, 3000), nn.Tanh(), nn.Linear(3000, 1))


def fit(folder: Path, steps: int, *callbacks: Callback, background: bool = True) -> None:
    """Train up to `steps`, with a checkpoint after each."""
    saving = ModelCheckpoint(folder, every=1, keep_last=1, background=background)
    Trainer(max_steps=steps, resume="auto", callbacks=[*callbacks, saving]).fit(Wide(), ToyLoader(toy_batches()))


def size(folder: Path) -> int:
    """The bytes of all files, in whole pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


def as_it_was(folder: Path, before: set[str]) -> None:
    """The only checkpoint is that of step 1, and nothing else was left."""
    store = CheckpointStore(folder / "checkpoints")
    assert store.latest() == store.path(1)
    assert {path.name for path in store.directory.iterdir()} == before


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of this size in memory."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs root, and leave to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_at_each_page_of_a_save(
    tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """A real one, filled up to so many pages while a real run trains; the error names the path and the bytes."""
    told = (
        r"could not write .*/step-00000002: (\[Errno 28\] No space left on device|.*) "
        r"\([\d,]+ bytes of it were written, [\d,]+ are free there\); it takes about [\d,]+ bytes"
    )
    with small_disk(tmp_path / "disk", 512 * PAGE) as disk:
        fit(disk / "run", 1)
        shutil.rmtree(disk / "run" / "model")
        filler, pages = disk / "filler", size(disk / "run" / "checkpoints" / "step-00000001") // PAGE
        every = range(0, pages, campaign(9, 1))
        for number, left in enumerate(every):

            def fill(trainer: Trainer, module: ToyModule, step: int, left: int = left) -> None:
                free = shutil.disk_usage(disk).free
                filler.write_bytes(bytes(free - left * PAGE))

            with pytest.raises(CheckpointError, match=told):
                fit(disk / "run", 2, LambdaCallback(on_step_start=fill), background=number % 2 == 0)
            filler.unlink()
            as_it_was(disk / "run", {".run", "step-00000001"})
        fit(disk / "run", 2)
        verify(disk / "run" / "checkpoints" / "step-00000002")
    tell(f"a disk that is full after {len(every)} different pages of a save", "error named, older whole, nothing left")


LIMITED = """
import resource, sys
from pathlib import Path
from tests.faults.test_storage import CheckpointError, as_it_was, fit

folder = Path(sys.argv[1])
before = {path.name for path in (folder / "checkpoints").iterdir()}
for limit in map(int, sys.argv[2].split(",")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        fit(folder, 2, background=limit % 1024 == 0)
        print(limit, "saved")
    except CheckpointError as error:
        as_it_was(folder, before)
        print(limit, error)
"""


def test_files_that_cannot_grow(tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell) -> None:
    """By a limit on their size, as a quota has it, at each 512 bytes: known before step 1, for no step is lost."""
    fit(tmp_path / "run", 1)
    largest = max(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "step-00000001").iterdir())
    limits = range(512, largest, campaign(16384, 512))
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "run"), ",".join(map(str, limits))]
    told = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True).stdout
    lines = told.splitlines()
    assert len(lines) == len(limits)
    assert all("cannot take a checkpoint of" in line and "File too large; raise that limit" in line for line in lines)
    fit(tmp_path / "run", 2)
    verify(tmp_path / "run" / "checkpoints" / "step-00000002")
    tell(f"{len(limits)} limits on the size of a file", "refused before step 1, older one whole, nothing left")


INJECTED = """
import sys
from pathlib import Path
from tests.faults.test_storage import fit
fit(Path(sys.argv[1]), 2, background=False)
"""


@pytest.mark.parametrize("error", ["EIO", "EDQUOT", "ENOSPC", "EINTR"])
@pytest.mark.parametrize("call", ["fsync", "write", "rename", "mkdir"])
def test_a_system_call_that_fails(tmp_path: Path, call: str, error: str, tell: Tell) -> None:
    """The disk does not do what is asked of it, by strace: told, or in the case of EINTR tried again."""
    if (
        shutil.which("strace") is None
        or subprocess.run(["strace", "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs strace, and leave to trace")
    fit(tmp_path / "run", 1)
    shutil.rmtree(tmp_path / "run" / "model")
    inside = str(tmp_path / "run" / "checkpoints" / ".writing-step-00000002")
    files = [inside, *(f"{inside}/{name}" for name in ("weights.safetensors", "optimizer.safetensors"))]
    only = [argument for path in files for argument in ("-P", path)]
    when = "1" if error == "EINTR" else "1+"
    inject = ["strace", "-f", "-o", "/dev/null", *only, "-e", f"inject={call}:error={error}:when={when}"]
    command = [*inject, sys.executable, "-c", INJECTED, str(tmp_path / "run")]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    if error == "EINTR" and call in ("fsync", "write"):
        assert done.returncode == 0, done.stderr
        verify(tmp_path / "run" / "checkpoints" / "step-00000002")
        return
    last = done.stderr.splitlines()[-1]
    number = getattr(errno, error)
    assert "CheckpointError: could not write" in last
    assert f"step-00000002: [Errno {number}] {os.strerror(number)}" in last
    as_it_was(tmp_path / "run", {".run", "step-00000001"})
    tell(f"{error} at {call}", "error named, older one whole, nothing left")


def test_too_many_open_files(tmp_path: Path, tell: Tell) -> None:
    """EMFILE while a checkpoint is written, and while one is read."""
    store = CheckpointStore(tmp_path)
    old, told, taken = store.save(1, one_file), list[str](), list[int]()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(descriptor) for descriptor in os.listdir("/dev/fd"))  # other tests may have left some open
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 16, hard))
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(6):
            for action in (lambda: store.save(2, one_file), lambda: verify(old)):
                try:
                    action()
                except CheckpointError as error:
                    told.append(str(error))
            os.close(taken.pop())
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert all("Too many open files" in message for message in told)
    assert any(message.startswith(f"could not write {store.path(2)}") for message in told)
    assert any(message.startswith(f"{old} cannot be read") for message in told)
    verify(old)
    verify(store.save(2, one_file))
    tell("no file can be opened any more", f"{len(told)} saves and reads failed, told as such; older one whole")


def one_file(directory: Path) -> None:
    (directory / "content").write_text("content")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_what_mlx_cannot_write_is_told_too(tmp_path: Path) -> None:
    """A module that hands MLX a path gets a RuntimeError without a number from it; the checkpoint's error names all."""
    store = CheckpointStore(tmp_path, expected_bytes=4096)
    old = store.save(1, one_file)

    def by_path(directory: Path) -> None:
        (directory / "weights.safetensors").symlink_to("/dev/full")
        mx.save_safetensors(str(directory / "weights.safetensors"), {"a": mx.zeros(100)})

    told = r"could not write .*step-00000002: .*Unable to write .*of it were written, .*; it takes about 4,096 bytes"
    with pytest.raises(CheckpointError, match=told):
        store.save(2, by_path)
    verify(old)
    assert [path.name for path in tmp_path.iterdir()] == [old.name]


def test_a_disk_that_is_only_read(tmp_path: Path) -> None:
    """Is told at the start, before the model is loaded."""
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        fit(disk / "run", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        module = Wide()
        with pytest.raises(OSError, match="cannot write into this folder: Read-only file system"):
            Trainer(callbacks=[ModelCheckpoint(disk / "run")]).fit(module, toy_batches())
        assert not hasattr(module, "model")


def test_a_disk_that_is_too_small_is_known_before_step_1(tmp_path: Path, tell: Tell) -> None:
    """What will be needed at the worst, and what there is, stand in the error; with fewer kept it goes on."""
    with small_disk(tmp_path / "disk", 400 * PAGE) as disk:
        for keep_last in (9, None, 1):
            saving = ModelCheckpoint(disk / f"keep {keep_last}", every=1, keep_last=keep_last)
            module = Large() if keep_last is None else Wide()
            trainer = Trainer(max_steps=3, callbacks=[saving])
            if keep_last == 1:
                trainer.fit(module, ToyLoader(toy_batches()))
                continue
            with pytest.raises(
                CheckpointError, match=r"has room for [\d,]+ bytes; this run needs [\d,]+ for (10|3) ch"
            ):
                trainer.fit(module, ToyLoader(toy_batches()))
            assert trainer.state.step == 0
    tell("a disk too small for the checkpoints that are kept", "refused before step 1 with both figures")


class Large(ToyModule):
    """A checkpoint of some 600 KB, of which two stand side by side when a third is written."""

    def setup(self, stage: str) -> None:
        self.model = nn.Sequential(nn.Linear(FEATURES, 6000), nn.Tanh(), nn.Linear(6000, 1))


def test_a_folder_that_is_removed_meanwhile(tmp_path: Path) -> None:
    """`rm -r` between two saves: the next one makes it again, as what the run knows is worth more than its end."""
    removed = []

    class Saving(ModelCheckpoint):
        def on_checkpoint_saved(self, trainer: Trainer, module: ToyModule, path: Path) -> None:
            if not removed:
                removed.append(shutil.rmtree(tmp_path / "run"))

    Trainer(max_steps=3, callbacks=[Saving(tmp_path / "run", every=1, background=False)]).fit(
        ToyModule(), ToyLoader(toy_batches())
    )
    assert [path.name for path in CheckpointStore(tmp_path / "run" / "checkpoints").list()] == [
        "step-00000002",
        "step-00000003",
    ]


def test_ending_at_once_leaves_no_half(tmp_path: Path) -> None:
    """A process that is terminated while the thread writes: what is there is whole."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mlx_trainer.checkpoint import store as checkpoint\n"
        "from tests.faults.test_storage import fit\nseal = checkpoint.seal\n"
        "def slow(*arguments):\n    print('sealing', flush=True)\n    time.sleep(30)\n    seal(*arguments)\n"
        "checkpoint.seal = slow\nfit(Path(sys.argv[1]), 2)\n"
    )
    fit(tmp_path / "run", 1)
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sealing\n"
        process.send_signal(signal.SIGKILL)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert store.latest() == store.path(1)
    fit(tmp_path / "run", 2)
    assert store.latest() == store.path(2)
