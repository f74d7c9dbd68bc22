"""What each recomputation policy costs and saves, and how near the memory estimate is, on a Mistral-7B shape.

    python benchmarks/recomputation.py                                  # an NVIDIA GPU or a large Mac
    python benchmarks/recomputation.py --hidden 128 --layers 8 --dtype float32 --shapes 2x64 4x64 --steps 2   # on a CPU

Random weights, made in memory; adapters of rank 16; the trainer's compiled step with AdamW, clipping and the NaN guard.
For each shape, rows x length, and each policy: the median time of a step after two, the peak, and the estimate. With
`--ahead` no step is waited for but the one before it, as in the trainer, and the time is the mean.
"""

import argparse
import itertools
import time
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from shape import TARGETS, VOCABULARY, mistral_config

from mlx_trainer import LoRAConfig, runtime
from mlx_trainer.callbacks import GradientClipping, NaNGuard
from mlx_trainer.cuda import kernels
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.memory import estimate
from mlx_trainer.models.recomputation import POLICIES
from mlx_trainer.step import TrainStep


class RandomMistral(CausalLMModule):
    """A module whose base is made, not loaded."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        lora = LoRAConfig(rank=16, alpha=32, dropout=arguments.dropout, target_modules=TARGETS[arguments.targets])
        super().__init__("random", lora=lora, dtype=arguments.dtype, warmup_steps=0, schedule="constant")
        self.settings = mistral_config(arguments.hidden, arguments.layers)
        self.bits = arguments.bits

    def load_model(self) -> nn.Module:
        """Random weights, layer by layer, so that those in float32 never exist all at once."""
        from mlx_lm.models.llama import Model, ModelArgs

        model = Model(ModelArgs.from_dict(self.settings))
        model.set_dtype(getattr(mx, self.dtype))
        if self.bits:
            nn.quantize(model, group_size=64, bits=self.bits)
        for layer in [*model.model.layers, model]:
            mx.eval(layer.parameters())
        return model


def batch_of(rows: int, length: int) -> UnpaddedBatch:
    """Equal rows of random ids, two thirds of each trained."""
    random = np.random.default_rng(0)
    trained = np.arange(length) >= length // 3
    trained[0] = False
    made = [TokenRow(f"{i}", random.integers(0, VOCABULARY, length).astype(np.int32), trained) for i in range(rows)]
    return collate_unpadded(made, Shape(rows, length, rows * length), rows * int(trained.sum()) + 1)


def step_of(module: CausalLMModule, guarded: bool = True) -> TrainStep:
    """The trainer's step of a new optimizer, with clipping and the NaN guard or without."""
    optimizer = module.configure_optimizer(None)
    optimizer.init(module.model.trainable_parameters())
    clipping, guard = GradientClipping(), NaNGuard()
    transforms, guards = [clipping.transform_gradients], {guard.name: guard.accept_update}
    return TrainStep(module, optimizer, 1, transforms if guarded else [], guards if guarded else {})


def measure(module: CausalLMModule, batch: UnpaddedBatch, steps: int, ahead: bool) -> tuple[float, float]:
    """Milliseconds of a step after two, their median or with `ahead` their mean, and the peak in GB."""
    step = step_of(module)
    mx.synchronize()
    mx.reset_peak_memory()
    ends, last = [], mx.array(0.0)
    for _ in range(3 + steps):
        before, last = last, step([batch]).total
        mx.eval(before if ahead else last)
        ends.append(time.perf_counter() * 1e3)
    times = np.diff(ends)[2:]
    return float(times.mean() if ahead else np.median(times)), mx.get_peak_memory() / 1e9


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--targets", choices=list(TARGETS), default="qv")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bits", type=int, help="pack the base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="+", default=["2x1024", "4x1024", "8x1024"], help="rows x length")
    parser.add_argument("--policies", choices=POLICIES, nargs="+", default=POLICIES)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ahead", action="store_true", help="wait for the step before only")
    parser.add_argument("--plain", action="store_true", help="without this package's CUDA kernels")
    arguments = parser.parse_args()
    if arguments.plain:
        kernels.usable = lambda *_: False
    return arguments


def main() -> None:
    """Measure all policies on all shapes, and print a table."""
    arguments = parse()
    module: Any = RandomMistral(arguments)
    module.setup("fit")
    mx.eval(module.model.parameters())
    print(f"{runtime.device_name()}, {runtime.backend()}: {vars(arguments)}\n")
    print(
        "| rows x length | recompute | ms a step | peak GB | estimate GB | estimate / peak |\n|---|---|---|---|---|---|"
    )
    for shape, policy in itertools.product(arguments.shapes, arguments.policies):
        batch = batch_of(*map(int, shape.split("x")))
        module.recompute = policy
        module.setup("fit")  # memory is bounded for this policy alone
        expected = estimate(module.model, batch, module.configure_optimizer(None), policy).peak / 1e9
        milliseconds, peak = measure(module, batch, arguments.steps, arguments.ahead)
        ratio = expected / peak
        print(f"| {shape} | {policy} | {milliseconds:,.1f} | {peak:.3g} | {expected:.3g} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
