"""What a checkpoint costs the training: none, in the background, in the loop.

    python benchmarks/checkpoint.py                # a small LoRA model
    python benchmarks/checkpoint.py --ballast 200  # with 200 MB more to train, and so 600 MB more in each checkpoint

The runs take turns in one process, on batches of one shape. A step's time is that between two batches being taken. A
checkpoint is due at the end of each `--every`th step, and so is a log, as they are by default: what the loop does at a
checkpoint is in that step's time. The steps after it share the machine with the thread that writes. Each place between
two checkpoints has a median of its own, and is compared with that of the run without checkpoints.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # waiting threads spin, and would take the writer's core

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from overhead import RECIPES, Clocked

import mlx_trainer as mt
from mlx_trainer.data import BatchMetadata

sys.path.insert(0, str(RECIPES))
from quickstart import FULL
from small_base import write_model

ROWS, LENGTH, WARM_UP = 8, 128, 1
"""The warm-up is one interval between two checkpoints."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Ballasted(mt.MistralLoRAModule):
    """The quick start's base with fresh adapters, and `megabytes` of parameters that nothing uses."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        lora = mt.LoRAConfig(rank=16, alpha=32, dropout=0.0, target_modules=LINEARS)
        super().__init__(folder, lora=lora, dtype="float32", max_seq_length=LENGTH)
        self.megabytes = megabytes

    def inject_lora(self, model: nn.Module) -> nn.Module:
        """The adapters, and the ballast."""
        model = super().inject_lora(model)
        if self.megabytes:
            model.ballast = mx.ones((self.megabytes, 250_000))
        return model


class Stalls(mt.Callback):
    """Keeps what the Trainer says of its checkpoints, in µs."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def on_log(self, trainer: mt.Trainer, module: mt.TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """A log tells of the checkpoint before it."""
        self.told += [metrics[name] for name in metrics if name == "perf/checkpoint_stall_us"]


def batches(steps: int) -> list[mt.Batch]:
    """Distinct rows, all of one length."""
    ids = np.random.default_rng(0).integers(10, FULL.base.vocabulary, (steps, ROWS, LENGTH)).astype(np.int32)
    metadata = BatchMetadata(("random",) * ROWS, ROWS * LENGTH, ROWS * LENGTH, ROWS * LENGTH)
    return [mt.Batch(each, np.ones_like(each), each, metadata) for each in ids]


def run(base: Path, ballast: int, saving: Iterable[mt.Callback], intervals: int, every: int) -> tuple[Clocked, Stalls]:
    """One training; the logs are those of all runs alike."""
    clocked, stalls = Clocked(batches((WARM_UP + 1 + intervals) * every)), Stalls()
    with tempfile.TemporaryDirectory() as folder:
        trainer = mt.Trainer(run_dir=folder, log_every=every // 2, callbacks=[stalls, *saving])
        trainer.fit(Ballasted(base, ballast), clocked)
    return clocked, stalls


def by_place(clocked: Clocked, every: int) -> np.ndarray:
    """Step times in µs, (intervals, every); the first column is the steps with a checkpoint."""
    steps = np.diff(clocked.times) * 1e6  # the first is step 1
    return steps[(WARM_UP + 1) * every - 1 :].reshape(-1, every)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ballast", type=int, default=0, metavar="MB")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--intervals", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    every = arguments.every

    def saving(background: bool) -> list[mt.Callback]:
        return [mt.ModelCheckpoint(every=every, keep_last=1, save_at_end=False, background=background)]

    ways = {"no checkpoint": [], "in the background": [True], "in the loop": [False]}
    steps: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    told: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as base:
        write_model(Path(base), FULL.base)
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                callbacks = [callback for background in way for callback in saving(background)]
                clocked, stalls = run(Path(base), arguments.ballast, callbacks, arguments.intervals, every)
                steps[name].append(by_place(clocked, every))
                told[name] += stalls.told[WARM_UP:]

    medians = {name: np.median(np.concatenate(each), axis=0) for name, each in steps.items()}
    plain = medians["no checkpoint"]
    print(f"{'':18} {'step, ms':>9} {'stall, µs':>10} {'on its step, µs':>23} {'on all steps, ms':>22}")
    for name, median in medians.items():
        stall = f"{statistics.median(told[name]):.0f}" if told[name] else ""
        extra = median - plain
        print(
            f"{name:18} {np.median(median) / 1e3:9.1f} {stall:>10} {extra[0]:+15.0f} {extra[0] / plain[0]:+7.1%} "
            f"{extra.sum() / 1e3:+14.2f} {extra.sum() / plain.sum():+7.1%}"
        )


if __name__ == "__main__":
    main()
