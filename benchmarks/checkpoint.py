"""What a checkpoint costs the training, written in the background and in the loop.

    python benchmarks/checkpoint.py                # a small LoRA model
    python benchmarks/checkpoint.py --ballast 200  # with 200 MB more to train, and so 600 MB more in each checkpoint

Batches have one shape, and a step's time is that between two being taken. A checkpoint is due at the end of each
`--every`th step: what the loop does for it is in that step's time. The steps after it share the machine with the thread
that writes. Halfway between two checkpoints begin as many steps without any, with a log at the same place, which the
steps from the checkpoint on are compared with: they are seconds apart, so that a shared machine's moods cancel. Medians
of the differences, over all checkpoints of runs that take turns.
"""

import argparse
import os
import statistics
import sys
import tempfile
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

ROWS, LENGTH = 8, 128
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


def run(base: Path, ballast: int, background: bool, checkpoints: int, every: int) -> tuple[Clocked, Stalls]:
    """One training of so many checkpoints, and one more to warm up."""
    clocked, stalls = Clocked(batches((checkpoints + 2) * every)), Stalls()
    saving = mt.ModelCheckpoint(every=every, keep_last=1, save_at_end=False, background=background)
    with tempfile.TemporaryDirectory() as folder:
        trainer = mt.Trainer(run_dir=folder, log_every=every // 2, callbacks=[stalls, saving])
        trainer.fit(Ballasted(base, ballast), clocked)
    return clocked, stalls


def by_place(clocked: Clocked, every: int) -> np.ndarray:
    """Step times in µs, (checkpoints, 2, every / 2): from the checkpoint on, and from halfway to the next on."""
    steps = np.diff(clocked.times) * 1e6  # the first is step 1
    return steps[2 * every - 1 :].reshape(-1, 2, every // 2)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ballast", type=int, default=0, metavar="MB")
    parser.add_argument("--every", type=int, default=4, help="an even number of steps")
    parser.add_argument("--checkpoints", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    ways = {"in the background": True, "in the loop": False}
    steps: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    told: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as base:
        write_model(Path(base), FULL.base)
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                clocked, stalls = run(Path(base), arguments.ballast, way, arguments.checkpoints, arguments.every)
                steps[name].append(by_place(clocked, arguments.every))
                told[name] += stalls.told[1:]

    print(f"{'':18} {'step, ms':>9} {'stall, µs':>10} {'on its step, µs':>23} {'in all, ms':>11}")
    for name in ways:
        with_one, without = np.concatenate(steps[name]).swapaxes(0, 1)  # each (checkpoints, places)
        step, extra = np.median(without), with_one - without
        its = np.median(extra[:, 0])
        print(
            f"{name:18} {step / 1e3:9.1f} {statistics.median(told[name]):10.0f} {its:+15.0f} {its / step:+7.1%} "
            f"{np.median(extra.sum(axis=1)) / 1e3:+11.2f}"
        )


if __name__ == "__main__":
    main()
