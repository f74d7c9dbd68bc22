"""Thousands of equal steps need no more memory than hundreds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.faults.conftest import Tell

SCRIPT = """
import gc, json, sys
import psutil
from mlx_trainer import (
    Callback, Evaluation, GradientClipping, LossSpike, MetricsLogger, ModelCheckpoint, NaNGuard, Trainer
)
from tests.toy import ToyModule, toy_batches

folder, warm_up, steps, leak_bytes = sys.argv[1], *map(int, sys.argv[2:])
process, sizes, leaked = psutil.Process(), [], []

class Resident(Callback):
    def on_step_end(self, trainer, module, step):
        leaked.append(bytes(leak_bytes))
        if step >= warm_up and (step - warm_up) % 100 == 0:
            gc.collect()
            sizes.append(process.memory_info().rss)

callbacks = [NaNGuard(), GradientClipping(), LossSpike("skip"), MetricsLogger(), Evaluation(every=200), Resident()]
callbacks.append(ModelCheckpoint(folder, every=100, keep_last=2))
trainer = Trainer(max_steps=warm_up + steps, max_epochs=10**6, log_every=10, run_dir=folder, callbacks=callbacks)
trainer.fit(ToyModule(), toy_batches((4,) * 50), toy_batches((4,) * 2, seed=1))
print(json.dumps(sizes))
"""
LIMIT_MIB = 1.0


def growth_mib(folder: Path, steps: int, leak_bytes: int = 0) -> float:
    """How much more resident memory a run of its own has at most, in the `steps` after 500 others."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), "500", str(steps), str(leak_bytes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    sizes = json.loads(done.stdout)
    assert len(sizes) == steps // 100 + 1
    return float(max(sizes) - sizes[0]) / 2**20


def test_resident_memory_stays(tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell) -> None:
    """Logs, guards, clipping, evaluations and checkpoints on: after a warm-up, under 1 MiB more."""
    steps = campaign(500, 2000)
    growth = growth_mib(tmp_path, steps)
    tell("resident memory of equal steps", f"{growth:+.2f} MiB over {steps} steps after 500")
    assert growth < LIMIT_MIB


def test_a_leak_would_be_seen(tmp_path: Path) -> None:
    """Three KiB kept from each step are more than the limit after 500 steps."""
    assert growth_mib(tmp_path, 500, leak_bytes=3072) > LIMIT_MIB
