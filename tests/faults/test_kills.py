"""Real signals at random times to a real training, which is started again until it ends (rows 1, 4, 5, 34 and 44).

What decides whether it was the same run: the last checkpoint, bit for bit (`held`), the ledger, the log, TensorBoard
and the samples, compared with a run that nobody disturbed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlx_trainer.checkpoint import CheckpointStore, verify
from mlx_trainer.monitoring.files import read_json_lines
from tests.faults.comparing import TIMES, held, tensors
from tests.faults.conftest import Tell

ROOT = Path(__file__).parents[2]
ENDLESS = 10**9
REST = 20
"""Steps that are left to the process which nobody disturbs."""


@contextmanager
def victim(folder: Path, steps: int = ENDLESS) -> Iterator[subprocess.Popen[str]]:
    """The training in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.faults.victim", str(folder), str(steps)]
    with subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def run(folder: Path, steps: int) -> None:
    """The training until `steps`, left alone."""
    with victim(folder, steps) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints")


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, which must be whole; 0 where there is none."""
    paths = store(folder).list() if (folder / "checkpoints").exists() else []
    if paths:
        verify(paths[-1])
    return max((int(path.name.removeprefix("step-")) for path in paths), default=0)


def temporaries(folder: Path) -> list[str]:
    """What a save had begun and not finished."""
    known = {path.name for path in store(folder).list()} if (folder / "checkpoints").exists() else set()
    return sorted(path.name for path in folder.glob("checkpoints/*") if path.name not in {".run", *known})


def timeless(path: Path) -> list[str]:
    """The records of a file of JSON lines as text, without times."""
    keep = [{k: v for k, v in record.items() if k != "time" and not k.endswith(TIMES)} for record in records(path)]
    return [json.dumps(record) for record in keep]


def records(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path)


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard's own reader makes of all files of the run."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def assert_same_run(disturbed: Path, whole: Path, steps: int, *but: str) -> None:
    """Checkpoint, without the parts of its state that are named in `but`, and ledger."""
    found = [held(folder / "checkpoints" / f"step-{steps:08d}") for folder in (disturbed, whole)]
    assert [{k: v for k, v in one.items() if k not in but} for one in found[:1]] == [
        {k: v for k, v in one.items() if k not in but} for one in found[1:]
    ]
    assert records(disturbed / "ledger.jsonl") == records(whole / "ledger.jsonl")
    assert [line["step"] for line in records(whole / "ledger.jsonl")] == [*range(1, steps + 1)]


def killed_until_it_ends(folder: Path, steps: int, rng: random.Random) -> int:
    """Start the training until `steps`, and kill it near its end, until it has come to it; how many kills that took."""
    kills = 0
    while True:
        with victim(folder, steps) as process:
            try:
                _, errors = process.communicate(timeout=rng.uniform(0.25, 0.6))
            except subprocess.TimeoutExpired:
                kills += 1
                continue
        assert process.returncode == 0, errors
        return kills


def test_killed_at_random_times(tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell) -> None:
    """SIGKILL while it starts, traces, trains, evaluates, logs and saves: the run that ends is the undisturbed one."""
    kills, rng, folder = campaign(25, 200), random.Random(5), tmp_path / "killed"
    longest = campaign(50, 100) / 100
    fell: Counter[str] = Counter()
    step = 0
    for _ in range(kills):
        with victim(folder) as process:
            time.sleep(rng.uniform(0.2, longest))
            process.kill()
            said, errors = process.communicate()
        assert errors.count("Traceback") == 0, errors
        fell["while it started" if "began" not in said else "in a save" if temporaries(folder) else "in between"] += 1
        assert newest(folder) >= step
        step = newest(folder)
    steps = step + REST
    at_the_end = killed_until_it_ends(folder, steps, rng)
    run(tmp_path / "whole", steps)

    assert_same_run(folder, tmp_path / "whole", steps)
    assert tensors(folder / "model") == tensors(tmp_path / "whole" / "model")
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert timeless(folder / name) == timeless(tmp_path / "whole" / name)
    for tag, every in (("train/loss", 2), ("val/loss", 4)):
        assert points(folder, tag) == points(tmp_path / "whole", tag)
        assert [at for at, _ in points(folder, tag)][: steps // every] == [*range(every, steps + 1, every)]
    assert fell["in a save"] > 0
    where = ", ".join(f"{count} {place}" for place, count in sorted(fell.items()))
    result = f"bit-identical; {where}, {at_the_end} near the end; TensorBoard has each step once"
    tell(f"SIGKILL at {kills + at_the_end} random times, {steps} steps", result)


def test_terminated_at_random_times(tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell) -> None:
    """SIGTERM: the step ends, is saved, exit code 143, nothing half written stays; the training is the same.

    Its end is evaluated wherever it comes, so the log has more evaluations, and perhaps another best one.
    """
    stops, rng, folder = campaign(10, 50), random.Random(6), tmp_path / "stopped"
    seconds: list[float] = []
    begun: list[int] = []  # 1 where the signal came between two steps
    saves: list[int] = []  # 0 where the step was saved already, 2 where it was then found to be the best
    for _ in range(stops):
        left_at = newest(folder)
        with victim(folder) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == f"began {left_at}\n"
            time.sleep(rng.uniform(0, 0.4))
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said, errors = process.communicate(timeout=60)
            seconds.append(time.monotonic() - sent)
        assert (process.returncode, temporaries(folder)) == (143, []), errors
        after = json.loads(said)
        begun.append(after["steps"])
        saves.append(after["saves"])
    assert (max(begun) <= 1, max(saves) <= 2) == (True, True)
    steps = newest(folder) + REST
    run(folder, steps)
    run(tmp_path / "whole", steps)

    assert_same_run(folder, tmp_path / "whole", steps, "callbacks", "evaluation", "metrics")
    latency = f"at most {max(begun)} step begun, {max(saves)} saves and {max(seconds):.2f} s"
    tell(f"SIGTERM at {stops} random times, {steps} steps", f"bit-identical, all exit with 143 after {latency}")


def test_the_victim_is_not_bored(tmp_path: Path) -> None:
    """What the campaigns rest on: left alone it saves, evaluates, logs and answers, and ends."""
    run(tmp_path, 24)
    assert newest(tmp_path) == 24
    assert [at for at, _ in points(tmp_path, "val/loss")] == [*range(4, 25, 4)]
    assert [record["step"] for record in records(tmp_path / "samples.jsonl")] == [0, *range(6, 25, 6)]
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, tmp_path, 22)  # it is not there any more
