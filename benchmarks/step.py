"""Where a step's time goes: the products alone, then what comes to them, one after the other, up to the whole step.

    python benchmarks/step.py                                                      # Mistral-7B's shape; a GPU
    python benchmarks/step.py --rows 4 --length 64 --hidden 128 --layers 2 --dtype float32          # on a CPU

Each is dispatched one ahead, as the trainer does, for `--seconds`: long enough for a GPU to come to the clocks that it
can keep, which are lower than those of a few products. The rate beside it is what the products alone would make of it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from recomputation import RandomMistral, batch_of, step_of
from shape import TARGETS, VOCABULARY

from mlx_trainer import runtime
from mlx_trainer.models.head import head_loss
from mlx_trainer.models.lora import base_of
from mlx_trainer.models.unpadded import hidden_states
from mlx_trainer.traced import from_tree, to_tree

Call = Callable[[], Any]


def linears_of(model: Any) -> list[Any]:
    """The frozen layers of all blocks."""
    parts = [(layer.self_attn, layer.mlp) for layer in model.model.layers]
    names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    found = [getattr(part, name) for block in parts for part, own in zip(block, names, strict=True) for name in own]
    return [base_of(layer) for layer in found]


def products(model: Any, positions: int) -> Call:
    """Every frozen product of the blocks, forward and towards its input, of the same arrays."""
    weights: list[Any] = [layer.weight for layer in linears_of(model)]
    widths = {width for weight in weights for width in weight.shape}
    arrays = {width: mx.random.normal((positions, width)).astype(weights[0].dtype) for width in widths}
    mx.eval(arrays)

    def call() -> mx.array:
        last = mx.array(0.0)
        for weight in weights:
            forward, backward = arrays[weight.shape[1]] @ weight.T, arrays[weight.shape[0]] @ weight
            mx.async_eval(forward, backward)
            last = backward
        return last

    return call


def gradients(module: Any, batch: Any, head: bool) -> Call:
    """The gradients of the adapters, of the hidden states alone or of the loss."""
    model = module.model
    tree = to_tree(batch)

    def loss(parameters: Any, tree: Any) -> mx.array:
        model.update(parameters)
        given = from_tree(tree)
        states = hidden_states(model, given, module.recomputation(given))
        return head_loss(model, states, given, VOCABULARY).total if head else states.astype(mx.float32).sum()

    compiled = mx.compile(mx.grad(loss))
    parameters = model.trainable_parameters()

    def call() -> Any:
        result = compiled(parameters, tree)
        model.update(parameters)
        return result

    return call


def whole(module: Any, batch: Any, guarded: bool) -> Call:
    """The step as the trainer takes it, with clipping and the guard or without."""
    step = step_of(module, guarded)
    return lambda: step([batch]).total


def milliseconds(call: Call, seconds: float) -> tuple[float, float]:
    """The median time between two calls that run one ahead, after the first half; and the peak in GB."""
    before = call()
    mx.eval(before)
    mx.reset_peak_memory()
    start, times = time.perf_counter(), []
    while time.perf_counter() < start + seconds or len(times) < 4:
        begun = time.perf_counter()
        after = call()
        mx.async_eval(after)
        mx.eval(before)
        before = after
        times.append((time.perf_counter() - begun) * 1e3)
    mx.eval(before)
    return float(np.median(times[len(times) // 2 :])), mx.get_peak_memory() / 1e9


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--targets", choices=list(TARGETS), default="qv")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bits", type=int, help="pack the base")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=6.0)
    return parser.parse_args()


def main() -> None:
    """Measure each, and print a table."""
    arguments = parse()
    module: Any = RandomMistral(arguments)
    module.setup("fit")
    mx.eval(module.model.parameters())
    batch, positions = batch_of(arguments.rows, arguments.length), arguments.rows * arguments.length
    multiplied = 4 * positions * sum(layer.weight.size for layer in linears_of(module.model))
    print(f"{runtime.device_name()}, {runtime.backend()}: {vars(arguments)}\n")
    print("| | ms | positions/s | peak GB | TFLOP/s of the frozen products |\n|---|---|---|---|---|")
    parts = {
        "frozen products of the blocks": lambda: products(module.model, positions),
        "blocks": lambda: gradients(module, batch, head=False),
        "blocks and loss": lambda: gradients(module, batch, head=True),
        "the step without callbacks": lambda: whole(module, batch, guarded=False),
        "the step": lambda: whole(module, batch, guarded=True),
    }
    for name, make in parts.items():
        ms, peak = milliseconds(make(), arguments.seconds)
        rates = f"{positions / ms * 1e3:,.0f} | {peak:.1f} | {multiplied / ms / 1e9:,.1f}"
        print(f"| {name} | {ms:,.1f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
