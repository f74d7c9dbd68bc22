"""Real signals and closed terminals: the step ends, it is saved, the exit code is the usual one; resuming is exact."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer.checkpoint import CheckpointStore, verify
from tests.faults.conftest import Tell
from tests.tiny import tiny_mistral

ROOT = Path(__file__).parents[2]
STEPS = 60
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from mlx_trainer import Callback, Evaluation, ModelCheckpoint, NaNGuard, ProgressBar, SampleGenerator, Trainer
from mlx_trainer.checkpoint import store as checkpoint
from mlx_trainer.state import random_state
from tests.toy import ToyLoader, ToyModule, toy_batches, weights

folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
slow = set(sys.argv[4:])

def say(text):
    print(text, flush=True)

def wait(what):
    if what in slow:
        slow.remove(what)
        say(what)
        time.sleep(1.5)

class Module(ToyModule):
    def training_loss(self, batch):
        wait("tracing")
        return super().training_loss(batch)

    def validation_loss(self, batch):
        wait("evaluating")
        return super().training_loss(batch)

    def generate(self, prompts, *, max_tokens=8, temperature=0.0, timeout_s=None):
        wait("generating")
        return ["nothing"] * len(prompts)

class Steps(Callback):
    def on_step_start(self, trainer, module, step):
        say(f"step {step}")
        time.sleep(pause)

class Late(Callback):
    phase = "checkpoint"

    def on_epoch_end(self, trainer, module, epoch):
        if "late" in slow:
            os.kill(os.getpid(), signal.SIGTERM)

seal = checkpoint.seal
def slow_seal(*arguments):
    wait("saving")
    seal(*arguments)
checkpoint.seal = slow_seal

module = Module()
callbacks = [NaNGuard(), Steps(), ProgressBar(), Evaluation(every=7), SampleGenerator(["a"], every=11, at_start=False)]
callbacks += [ModelCheckpoint(folder, every=5, background="in the loop" not in slow), Late()]
trainer = Trainer(max_steps=steps, accumulate=2, log_every=3, callbacks=callbacks, resume="auto", run_dir=folder)
result = trainer.fit(module, ToyLoader(toy_batches()), toy_batches((3, 2), seed=9))
(folder / "end.json").write_text(json.dumps([weights(module), random_state(), result.steps, result.counts]))
"""


@contextmanager
def started(folder: Path, *slow: str, steps: int = STEPS, pause: float = 0.0, **options: Any) -> Iterator[Any]:
    """The script in a process and a process group of its own; it pauses 1.5 s in what is `slow`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"} | options.pop("env", {})
    command = [sys.executable, "-c", SCRIPT, str(folder), str(steps), str(pause), *slow]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "start_new_session": True} | options
    with subprocess.Popen(command, env=environment, **options) as process:
        yield process


def wait_for(process: Any, text: str) -> None:
    """Read what the process prints until a line is `text`."""
    for line in process.stdout:
        if line.decode().strip() == text:
            return
    pytest.fail(f"the process ended before it printed {text!r}")


def end(folder: Path) -> Any:
    """Run, from where an earlier run stopped, to the last step; what must be the same bit for bit."""
    with started(folder) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads((folder / "end.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The end of a run that nobody interrupted."""
    return end(tmp_path_factory.mktemp("whole"))


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; all are verified."""
    paths = CheckpointStore(folder / "checkpoints").list()
    for path in paths:
        verify(path)
    return int(paths[-1].name.removeprefix("step-")) if paths else 0


def test_signals_at_random_times(
    tmp_path: Path, undisturbed: Any, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """Interrupted again and again until it is through, it saves each time and ends as if never interrupted."""
    chance, count, saves = random.Random(1), 0, 0
    for run in range(campaign(1, 30)):
        folder = tmp_path / f"{run}"
        code = None
        while code != 0:
            number = chance.choice(list(CODES))
            with started(folder, pause=0.02) as process:
                if newest(folder) == STEPS:  # it was interrupted at its very end: nothing is left to do
                    process.communicate(timeout=60)
                    break
                wait_for(process, f"step {newest(folder) + 1}")
                time.sleep(chance.uniform(0, 0.6))
                process.send_signal(number)
                process.communicate(timeout=60)
            code = process.returncode
            assert code in (0, CODES[number]) or newest(folder) == STEPS
            count, saves = count + 1, saves + (code != 0)
        assert json.loads((folder / "end.json").read_text()) == undisturbed
    tell("5 to 7, 9 SIGINT, SIGTERM, SIGHUP at random times", f"{count} signals, {saves} saves, the end is the same")


@pytest.mark.parametrize("what", ["tracing", "evaluating", "generating", "saving"])
def test_a_signal_while_something_else_is_done(
    what: str, tmp_path: Path, undisturbed: Any, campaign: Callable[[int, int], int]
) -> None:
    """What is under way is finished, the step it belongs to is saved, and the resumed run ends the same."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[: campaign(1, 3)]:
        folder = tmp_path / number.name
        with started(folder, what, "in the loop") as process:
            wait_for(process, what)
            process.send_signal(number)
            process.communicate(timeout=60)
        assert process.returncode == CODES[number]
        assert newest(folder) == {"tracing": 1, "evaluating": 7, "generating": 11, "saving": 5}[what]
        assert end(folder) == undisturbed


def test_a_stop_request_after_the_last_look_is_saved(tmp_path: Path, undisturbed: Any) -> None:
    """A signal at the end of an epoch, once ModelCheckpoint has looked: the four steps of the epoch are not lost."""
    with started(tmp_path, "late") as process:
        process.communicate(timeout=60)
    assert process.returncode == 143
    assert newest(tmp_path) == 4
    assert end(tmp_path) == undisturbed


@pytest.mark.parametrize("way", ["in the loop", "in the background"])
def test_a_second_interrupt_during_the_save(way: str, tmp_path: Path, undisturbed: Any) -> None:
    """It ends at once; the checkpoint under way is none, and the one before is whole."""
    with started(tmp_path, way, steps=5) as process:
        process.communicate(timeout=60)
    with started(tmp_path, "saving", way, pause=0.02) as process:
        wait_for(process, "saving")  # of step 10, in the loop; of step 10, in the background
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        second = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - second < 1.1  # the save had 1.2 s to go
    assert newest(tmp_path) == 5
    assert end(tmp_path) == undisturbed


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_ends_nothing(stream: str, tmp_path: Path, undisturbed: Any) -> None:
    """`… | head -1`: what is written afterwards goes nowhere, the run goes on to its end."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE}
    with started(tmp_path, **options) as process:
        reader = getattr(process, stream)
        reader.readline()
        reader.close()
        process.wait(timeout=60)
    assert process.returncode == 0
    assert json.loads((tmp_path / "end.json").read_text()) == undisturbed


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_command_line_into_head(tmp_path: Path) -> None:
    """`mlx-trainer train … | head -1`: the command ends with 0, its checkpoints and its adapter are there."""
    tiny_mistral(tmp_path / "model")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * n}."} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = "--training.num_epochs 1 --training.save_steps 2 --training.logging_steps 1 --model.dtype float32"
    command = f"{sys.executable} -m mlx_trainer train rows.jsonl --model ./model --output run {options} 2>&1 | head -1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.count(b"\n"), done.stderr) == (0, 1, b"")
    assert newest(tmp_path / "run") > 2
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_closed_terminal_is_like_sigterm(tmp_path: Path, undisturbed: Any) -> None:
    """A real terminal goes away: the kernel sends SIGHUP, writing to it fails, and the step under way is saved."""
    mine, its = pty.openpty()
    streams = {"stdin": its, "stdout": its, "stderr": its, "preexec_fn": lambda: terminal(its)}
    with started(tmp_path, pause=0.05, **streams) as process:
        os.close(its)
        shown = b""
        while b"step 12" not in shown:
            shown += os.read(mine, 4096)
        os.close(mine)
        process.wait(timeout=60)
    assert process.returncode == 129
    assert newest(tmp_path) >= 12
    assert end(tmp_path) == undisturbed


def terminal(descriptor: int) -> None:
    """Make it the controlling terminal of this session, as a terminal program does."""
    import fcntl
    import termios

    fcntl.ioctl(descriptor, termios.TIOCSCTTY, 0)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="there is no g++ that MLX starts")
def test_an_interrupt_that_reaches_the_compiler_too(tmp_path: Path, undisturbed: Any, tell: Tell) -> None:
    """Ctrl-C in a terminal goes to the whole group: the C++ compiler of a kernel dies with it, and is started again."""
    kernels = tmp_path / "kernels"  # an empty cache, so that kernels are compiled
    kernels.mkdir()
    with started(tmp_path / "run", env={"TMPDIR": str(kernels)}) as process:
        wait_for(process, "step 1")
        assert compiler_of(process)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert newest(tmp_path / "run") >= 1
    assert end(tmp_path / "run") == undisturbed
    tell("8 Ctrl-C while a kernel is compiled", "the compiler died and was started again; saved, resumed: same")


def compiler_of(process: Any) -> bool:
    """Wait up to 10 s until the process has started a compiler; whether it has."""
    tasks, until = Path(f"/proc/{process.pid}/task"), time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        children = [child for path in tasks.glob("*/children") for child in path.read_text().split()]
        with suppress(FileNotFoundError):  # one that has ended meanwhile
            # Not MLX's look at `g++ --version`: it is made with system(3), which ignores SIGINT for as long.
            if any(b"-shared" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children):
                return True
        time.sleep(0.002)
    return False
