"""Real signals sent to a real process: the step ends, the run is saved, the exit code is the usual one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_trainer.checkpoint import CheckpointStore, verify

SCRIPT = """
import sys, time
from pathlib import Path
from mlx_trainer import Callback, ModelCheckpoint, Trainer
from mlx_trainer.state import random_state
from tests.toy import ToyLoader, ToyModule, toy_batches, weights
import json

folder, pause, steps = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])

class Slow(Callback):
    def on_step_start(self, trainer, module, step):
        print("step", step, flush=True)
        time.sleep(pause)

    def on_exception(self, trainer, module, error):
        print("exception", type(error).__name__, flush=True)

module = ToyModule()
callbacks = [Slow(), ModelCheckpoint(folder, every=1000)]
trainer = Trainer(max_steps=steps, callbacks=callbacks, resume="auto")
result = trainer.fit(module, ToyLoader(toy_batches()))
(folder / "end.json").write_text(json.dumps([weights(module), random_state(), result.steps]))
print("after fit", flush=True)
"""


@contextmanager
def started(folder: Path, pause: float, steps: int) -> Iterator[subprocess.Popen[str]]:
    """The script in a process of its own, with a group of its own as a terminal would give it."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(pause), str(steps)]
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(arguments, **options) as process:  # type: ignore[call-overload]
        yield process


def run(folder: Path) -> object:
    """Twelve steps, from where an earlier run stopped; what must be the same bit for bit at the end."""
    with started(folder, 0, 12) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads((folder / "end.json").read_text())


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read what the process prints until a line is `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == text:
            return
    pytest.fail(f"the process ended before it printed {text!r}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_exits(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """What was interrupted in step 5 has a good checkpoint of step 5, and resumed it ends as if never interrupted."""
    with started(tmp_path / "run", 0.2, 12) as process:
        wait_for(process, "step 5")
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)

    assert (process.returncode, rest) == (code, "")  # no further step, no exception, nothing after fit
    (checkpoint,) = CheckpointStore(tmp_path / "run" / "checkpoints").list()
    verify(checkpoint)
    assert checkpoint.name == "step-00000005"

    assert run(tmp_path / "run") == run(tmp_path / "whole")


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    """Within the step, without saving, as an ordinary KeyboardInterrupt; what was there before stays as it was."""
    with started(tmp_path / "run", 30, 12) as process:
        wait_for(process, "step 1")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        second = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=20)

    assert time.monotonic() - second < 10  # the step had nearly 30 s to go
    assert (process.returncode, rest) == (-signal.SIGINT, "exception KeyboardInterrupt\n")
    assert CheckpointStore(tmp_path / "run" / "checkpoints").list() == []
