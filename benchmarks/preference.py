"""What a pair costs where its prompt is computed once, beside two rows of their own: DPO or ORPO on a Mistral shape.

    python benchmarks/preference.py                                    # an NVIDIA GPU or a large Mac: Mistral-7B
    python benchmarks/preference.py --hidden 256 --layers 4 --dtype float32 --pairs 2 --steps 5         # on a CPU

Random weights, made in memory; adapters of rank 16; the trainer's compiled step with AdamW. For each size of prompt and
answers, taking turns in one run: milliseconds for a pair with shared prompts, with separate rows, and with separate
rows that are padded, the median of the steps after two of each. Answers are of half to all of their size.
"""

import argparse
import time
from typing import Any

import mlx.core as mx
import numpy as np
from recomputation import RandomMistral
from shape import VOCABULARY

from mlx_trainer import runtime
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.preference import DPOModule, ORPOModule
from mlx_trainer.step import TrainStep

LAYOUTS = ("shared", "separate", "padded")


class RandomDPO(RandomMistral, DPOModule):
    """DPO on a base that is made, not loaded."""


class RandomORPO(RandomMistral, ORPOModule):
    """ORPO on such a base."""


def rows_of(pairs: int, prompt: int, answer: int) -> list[TokenRow]:
    """Pairs with the same prompt on both sides, and answers of half to all of `answer` tokens."""
    random, rows = np.random.default_rng(0), []
    for _ in range(pairs):
        asked = random.integers(0, VOCABULARY, prompt)
        for side, length in zip(("chosen", "rejected"), random.integers(answer // 2, answer + 1, 2), strict=True):
            ids = np.concatenate([asked, random.integers(0, VOCABULARY, length)]).astype(np.int32)
            rows.append(TokenRow(side, ids, np.arange(len(ids)) >= prompt, side))
    return rows


def batch_of(rows: list[TokenRow], prompt: int, layout: str) -> Any:
    """All rows as one batch."""
    longest, tokens = max(map(len, rows)), sum(map(len, rows))
    if layout == "padded":
        return collate(rows, Shape(len(rows), longest, tokens))
    step = runtime.attention_step()  # as the loader plans them
    prefix, groups = ((prompt - 1) // step * step, len(rows) // 2) if layout == "shared" else (0, 0)
    shape = Shape(len(rows), longest - prefix, tokens - groups * prefix + 1, prefix, groups)
    return collate_unpadded(rows, shape, sum(row.trained_tokens for row in rows) + 1)


def step_of(module: Any) -> TrainStep:
    """The trainer's step."""
    optimizer = module.configure_optimizer(None)
    optimizer.init(module.model.trainable_parameters())
    return TrainStep(module, optimizer)


def measure(module: Any, batches: dict[str, Any], pairs: int, steps: int) -> dict[str, float]:
    """Median milliseconds for a pair with each batch; they take turns after two steps of each."""
    step, times = step_of(module), {name: [] for name in batches}
    for _ in range(2 + steps):
        for name, batch in batches.items():
            start = time.perf_counter()
            mx.eval(step([batch]).total, module.model.trainable_parameters())
            times[name].append((time.perf_counter() - start) * 1e3 / pairs)
    return {name: float(np.median(taken[2:])) for name, taken in times.items()}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--method", choices=("dpo", "orpo"), default="dpo")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--sizes", nargs="+", default=["80+128", "272+128", "528+64"], help="prompt+answer")
    parser.add_argument("--steps", type=int, default=7)
    return parser.parse_args(namespace=argparse.Namespace(targets="qv", dropout=0.0, bits=None))


def main() -> None:
    """Measure all sizes, and print a table."""
    arguments = parse()
    module: Any = {"dpo": RandomDPO, "orpo": RandomORPO}[arguments.method](arguments)
    module.setup("fit")
    mx.eval(module.model.parameters())
    print(f"{runtime.device_name()}, {runtime.backend()}: {vars(arguments)}\n")
    print("| prompt + answer | shared, ms a pair | separate | padded | separate / shared |\n|---|---|---|---|---|")
    for size in arguments.sizes:
        prompt, answer = map(int, size.split("+"))
        rows = rows_of(arguments.pairs, prompt, answer)
        found = measure(
            module, {name: batch_of(rows, prompt, name) for name in LAYOUTS}, arguments.pairs, arguments.steps
        )
        told = " | ".join(f"{found[name]:,.1f}" for name in LAYOUTS)
        print(f"| {size} | {told} | {found['separate'] / found['shared']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
