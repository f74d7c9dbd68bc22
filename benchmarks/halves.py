"""Halves of a batch side by side on a Linux CPU, beside the whole batch (`mlx_trainer/side_by_side.py`).

    python benchmarks/halves.py
    python benchmarks/halves.py --layers 12 --hidden 128 --tokens 1024 --targets qv

The trainer's compiled step with AdamW, clipping and the NaN guard, on rows of mixed length, float32, random weights,
one BLAS thread. Whole and halved batches take turns; the median step counts, and how many cores were busy.
"""

import argparse
import os
import statistics
import time
from argparse import Namespace
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import numpy as np
from recomputation import RandomMistral, step_of
from shape import TARGETS, mistral_config

from mlx_trainer import side_by_side, step
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import causal_lm

MEAN_LENGTH = 68
"""The quick start's."""


def module_of(arguments: Namespace) -> RandomMistral:
    """A model that trains, whose batches are halved whatever their size."""
    causal_lm.WORTH_HALVING = 0
    module: Any = RandomMistral(Namespace(**vars(arguments), dropout=0.0, dtype="float32", bits=None))
    module.settings = mistral_config(arguments.hidden, arguments.layers, arguments.vocabulary)
    module.setup("fit")
    mx.eval(module.model.parameters())
    return module


def batch_of(arguments: Namespace) -> UnpaddedBatch:
    """Rows of mixed length, two thirds of each trained."""
    random = np.random.default_rng(0)
    count = max(arguments.tokens // MEAN_LENGTH, 2)
    lengths = np.sort(random.integers(MEAN_LENGTH // 2, MEAN_LENGTH * 3 // 2, count))
    lengths = np.maximum(lengths * arguments.tokens // lengths.sum() - 1, 3)
    rows = [
        TokenRow(f"{i}", random.integers(0, arguments.vocabulary, n).astype(np.int32), np.arange(n) > n // 3)
        for i, n in enumerate(lengths)
    ]
    shape = Shape(count, int(lengths.max()), arguments.tokens)
    return collate_unpadded(rows, shape, arguments.tokens * 2 // 3 + 2)


def main() -> None:
    """Measure in turns and print a row of a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--targets", choices=list(TARGETS), default="all")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    batch, both = batch_of(arguments), [None, side_by_side.second_stream()]
    steps, times, busy, peaks = {}, {}, {}, {}
    for name, streams in (("whole", [None]), ("halves", both)):
        step.streams = lambda streams=streams: streams
        steps[name], times[name], busy[name], peaks[name] = step_of(module_of(arguments)), [], [], []
        mx.eval(steps[name]([batch]).total)
    for _ in range(arguments.rounds):
        for name, taken in steps.items():
            mx.synchronize()
            mx.reset_peak_memory()
            held, before, work, last = mx.get_active_memory(), time.perf_counter(), time.process_time(), None
            for _ in range(10):
                previous, last = last, taken([batch]).total
                mx.eval(last if previous is None else previous)
            mx.eval(last)
            wall = time.perf_counter() - before
            times[name].append(100 * wall)
            busy[name].append((time.process_time() - work) / wall)
            peaks[name].append((mx.get_peak_memory() - held) / 1e6)
    found = {name: [statistics.median(each[name]) for each in (times, busy, peaks)] for name in steps}
    (whole, _, before), (halves, cores, peak) = found["whole"], found["halves"]
    print("| layers x hidden, tokens, adapters | whole, ms | halves, ms | ratio | cores busy | memory of a step |")
    print("|---|---|---|---|---|---|")
    shape = f"{arguments.layers}x{arguments.hidden}, {arguments.tokens:,}, {arguments.targets}"
    print(f"| {shape} | {whole:.1f} | {halves:.1f} | {whole / halves:.2f} | {cores:.2f} | {peak / before:.2f} |")


if __name__ == "__main__":
    main()
