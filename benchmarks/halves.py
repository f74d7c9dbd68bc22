"""Halves of a batch side by side on a Linux CPU, beside the whole batch (`mlx_trainer/side_by_side.py`), or more parts.

    python benchmarks/halves.py
    python benchmarks/halves.py --layers 12 --hidden 128 --tokens 1024 --targets qv
    python benchmarks/halves.py --parts 8                              # halves of halves, each on a stream of its own
    OPENBLAS_NUM_THREADS=15 python benchmarks/halves.py                # for the whole batch of a machine with 16 cores

The trainer's compiled step with AdamW, clipping and the NaN guard, on rows of mixed length, float32, random weights,
one BLAS thread unless told. Whole and parted batches take turns; the median step counts, and how many cores were busy.
"""

import argparse
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import numpy as np
from recomputation import RandomMistral, step_of
from shape import TARGETS, mistral_config

from mlx_trainer import step
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.data.store.store import TokenRow

MEAN_LENGTH = 68
"""The quick start's."""


class Parted(RandomMistral):
    """A model whose batches are halved until there are so many parts, whatever their size."""

    def __init__(self, arguments: Namespace) -> None:
        super().__init__(arguments)
        self.count = arguments.parts

    def parts(self, batch: Any) -> Sequence[Any]:
        """Return halves of halves; fewer where some cannot be halved."""
        found, before = [batch], 0
        while before < len(found) < self.count:
            before, found = len(found), [half for part in found for half in part.halves()]
        return found


def module_of(arguments: Namespace) -> Parted:
    """A model that trains."""
    module: Any = Parted(Namespace(**vars(arguments), dropout=0.0, dtype="float32", bits=None))
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
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    batch = batch_of(arguments)
    streams_of_parts = [None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(arguments.parts - 1))]
    steps, times, busy, peaks = {}, {}, {}, {}
    for name, streams in (("whole", [None]), ("parts", streams_of_parts)):
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
    (whole, _, before), (parts, cores, peak) = found["whole"], found["parts"]
    count = arguments.parts
    print(
        f"| layers x hidden, tokens, adapters | whole, ms | {count} parts, ms | ratio | cores busy | memory of a step |"
    )
    print("|---|---|---|---|---|---|")
    shape = f"{arguments.layers}x{arguments.hidden}, {arguments.tokens:,}, {arguments.targets}"
    print(f"| {shape} | {whole:.1f} | {parts:.1f} | {whole / parts:.2f} | {cores:.2f} | {peak / before:.2f} |")


if __name__ == "__main__":
    main()
