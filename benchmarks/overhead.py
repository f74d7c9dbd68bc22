"""What the Trainer costs a step over the same compiled step in a raw loop.

    python benchmarks/overhead.py               # a tiny model: what is paid at every step, whatever the model
    python benchmarks/overhead.py --quickstart  # the quick start's fine-tune with all its callbacks on
    python benchmarks/overhead.py --quickstart --host  # the same, only what Python's own thread works

A step's time is that between two batches being taken, the same way for all loops, which take turns. The raw loop runs
one step ahead, as the Trainer does; a second one waits for each step, as most scripts do. Of the tiny model's steps the
median counts; of the quick start's the mean of the process's CPU time, logs included, with one BLAS thread: on a shared
machine wall time varies by more than what is to be measured. Batches are whole there: halves side by side take less
time and more work, and the raw loop has none. Evaluations, samples and checkpoints are work of their own and fall
outside the steps that are measured; the callbacks that ask for them are on.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # waiting threads spin, and would count as work

import mlx_trainer as mt
from mlx_trainer import step
from mlx_trainer.traced import from_tree, shape_key, to_tree

RECIPES = Path(__file__).parent.parent / "recipes"
NEVER = 10**9
Loops = dict[str, Callable[[], float]]


class Clocked:
    """Batches that note when each was taken."""

    def __init__(self, batches: Sequence[Any], clock: Callable[[], float] = time.perf_counter) -> None:
        self.batches, self.clock = batches, clock
        self.times: list[float] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.times.append(self.clock())
            yield batch

    def microseconds(self, statistic: Callable[[Sequence[float]], float], warm_up: int) -> float:
        """The median or mean step after the warm-up."""
        return statistic(np.diff(self.times)[warm_up:].tolist()) * 1e6


def raw(module: mt.TrainerModule, batches: Clocked, ahead: bool) -> None:
    """The loop written by hand."""
    module.setup("fit")
    optimizer = module.configure_optimizer(len(batches))
    optimizer.init(module.model.trainable_parameters())
    state: list[Any] = [module.model.state, optimizer.state, mx.random.state]

    def update(tree: Any) -> mx.array:
        def mean_loss(_: nn.Module) -> mx.array:
            output = module.training_loss(from_tree(tree))
            return output.total / output.weight

        loss, gradients = nn.value_and_grad(module.model, mean_loss)(module.model)
        optimizer.update(module.model, gradients)
        return loss

    compiled, previous = mx.compile(update, inputs=state, outputs=state), None
    for batch in batches:
        loss = compiled(to_tree(batch))
        mx.async_eval(loss, state)
        mx.eval(previous if ahead and previous is not None else loss)
        previous = loss


# A tiny model.


class Tiny(mt.TrainerModule):
    """64-64-8, the shape that other frameworks' overhead was measured with."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def training_loss(self, batch: dict[str, mx.array]) -> mt.LossOutput:
        """Squared error, summed over rows and outputs."""
        error = self.model(batch["x"]) - batch["y"]
        return mt.LossOutput(mx.square(error).sum(), mx.array(error.size, mx.float32))

    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        """Plain gradient descent: the cheapest update, so that overhead shows most."""
        return optimizers.SGD(1e-3)


class Idle(mt.Callback):
    """Hears two events a step and does nothing."""

    def __init__(self, number: int) -> None:
        self.name = f"idle {number}"

    def on_step_start(self, trainer: mt.Trainer, module: mt.TrainerModule, step: int) -> None:
        """Nothing."""

    def on_step_end(self, trainer: mt.Trainer, module: mt.TrainerModule, step: int) -> None:
        """Nothing."""


def tiny_loops(steps: int) -> Loops:
    """The loops over a tiny model, on batches of 32 rows made beforehand."""
    rng = np.random.default_rng(0)
    arrays = [{"x": mx.array(rng.normal(size=(32, 64)), mx.float32), "y": mx.zeros((32, 8))} for _ in range(16)]
    mx.eval(arrays)

    def timed(loop: Callable[[Clocked], Any]) -> float:
        batches = Clocked([arrays[i % 16] for i in range(steps)])
        loop(batches)
        return batches.microseconds(statistics.median, warm_up=steps // 10)

    def trained(batches: Clocked, idle: int) -> None:
        mt.Trainer(log_every=NEVER, callbacks=[Idle(i) for i in range(idle)]).fit(Tiny(), batches)

    return {
        "raw loop, one step ahead": lambda: timed(lambda batches: raw(Tiny(), batches, ahead=True)),
        "raw loop, waiting for each step": lambda: timed(lambda batches: raw(Tiny(), batches, ahead=False)),
        "Trainer": lambda: timed(lambda batches: trained(batches, idle=0)),
        "Trainer, 8 idle callbacks": lambda: timed(lambda batches: trained(batches, idle=8)),
    }


# The quick start's fine-tune.


def quickstart_loops(steps: int, folder: Path, clock: Callable[[], float]) -> Loops:
    """The loops over the quick start's shape (fresh weights: they cost the same), rows, optimizer and callbacks."""
    sys.path.insert(0, str(RECIPES))
    from docstrings import read_library
    from quickstart import FULL
    from small_base import write_jsonl, write_model, write_tokenizer

    step.streams = lambda: [None]
    entries = [entry for entry in read_library() if entry.public]
    write_tokenizer(folder, [entry.page() for entry in entries], FULL.base.vocabulary)
    write_model(folder, FULL.base)
    write_jsonl(folder / "chats.jsonl", (entry.chat() for entry in entries[: 8 * steps + 64]))

    def module() -> mt.MistralLoRAModule:
        linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        lora = mt.LoRAConfig(rank=16, alpha=32, dropout=0.0, target_modules=linears)
        return mt.MistralLoRAModule(folder, lora=lora, dtype="float32", max_seq_length=128, learning_rate=3e-3)

    layout = module().batch_layout
    data = mt.DataPipeline(folder / "chats.jsonl", module().tokenizer, batch_size=8, max_seq_length=128, layout=layout)
    shuffled, held_out = list(data.train_loader())[:steps], list(data.validation_loader() or [])
    first = list({shape_key(to_tree(batch)): batch for batch in shuffled}.values())
    batches = [*first, *shuffled]  # every shape is compiled before the clock counts

    def callbacks() -> list[mt.Callback]:
        return [
            mt.GradientClipping(),
            mt.NaNGuard(),
            mt.MemoryMonitor(),
            mt.Evaluation(every=NEVER),
            mt.EarlyStopping(),
            mt.SampleGenerator(["What does `textwrap.dedent(text)` do?"], every=NEVER, at_start=False),
            mt.LambdaCallback(on_evaluation_end=lambda trainer, module, step, metrics: None),
            mt.ProgressBar(),
            mt.MetricsLogger(),
            mt.TensorBoardLogger(),
            mt.ModelCheckpoint(every=NEVER, monitor="val/loss"),
        ]

    def timed(loop: Callable[[Clocked], Any]) -> float:
        clocked = Clocked(batches, clock)
        loop(clocked)
        return clocked.microseconds(statistics.mean, warm_up=len(first) + 5)

    def trained(clocked: Clocked, chosen: list[mt.Callback]) -> None:
        mt.Trainer(log_every=25, callbacks=chosen, run_dir=folder / "run").fit(module(), clocked, held_out[:1])

    return {
        "raw loop, one step ahead": lambda: timed(lambda clocked: raw(module(), clocked, ahead=True)),
        "Trainer, no callbacks": lambda: timed(lambda clocked: trained(clocked, [])),
        "Trainer, all callbacks": lambda: timed(lambda clocked: trained(clocked, callbacks())),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quick = arguments.quickstart
        clock = time.thread_time if arguments.host else time.process_time
        steps = arguments.steps or (100 if quick else 3000)
        loops = quickstart_loops(steps, Path(folder), clock) if quick else tiny_loops(steps)
        rounds = [{name: loop() for name, loop in loops.items()} for _ in range(arguments.rounds)]
    base = next(iter(loops))
    print(f"{'µs a step':34} {'median':>10} {'over raw':>10} {'ratio':>7}   (of {arguments.rounds} rounds)")
    for name in loops:
        median = statistics.median(each[name] for each in rounds)
        over = statistics.median(each[name] - each[base] for each in rounds)
        ratio = statistics.median(each[name] / each[base] for each in rounds)
        print(f"{name:34} {median:10.1f} {over:+10.1f} {ratio:7.3f}")


if __name__ == "__main__":
    main()
