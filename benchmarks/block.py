"""Where the time of a step goes: the parts of a transformer block, each forward and backward alone, and the whole.

    python benchmarks/block.py                                    # a Mistral-7B block in bfloat16, on an NVIDIA GPU
    python benchmarks/block.py --hidden 256 --positions 1024 --rows 8 --length 128 --dtype float32    # a CPU

Each part is the library's own function on random values, compiled; the whole is the block as `hidden_states` has it.
What the parts' sum leaves of the whole is additions between them, and what MLX could not overlap or fuse. A GPU that
works for long gets hot and clocks down: block and one large product are measured for `--seconds` without a pause too.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.llama import Model, ModelArgs
from shape import TARGETS, mistral_config

from mlx_trainer import runtime
from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.head import head_loss
from mlx_trainer.models.lora import inject_lora, project
from mlx_trainer.models.rows import Rows
from mlx_trainer.models.unpadded import attend, block, swiglu

Part = tuple[str, Callable[..., Any], Sequence[mx.array]]
Call = Callable[[], Any]


def make_model(arguments: argparse.Namespace) -> Any:
    """A model of one block with random weights, frozen, with the adapters that were asked for."""
    config = mistral_config(arguments.hidden, 1, arguments.vocabulary)
    model = Model(ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, arguments.dtype))
    model.freeze()
    if arguments.targets in TARGETS:
        inject_lora(model, LoRAConfig(rank=16, alpha=32, dropout=0.0, target_modules=TARGETS[arguments.targets]))
    model.train()
    mx.eval(model.parameters())
    return model


def make_batch(arguments: argparse.Namespace) -> Any:
    """The arrays of an unpadded batch of rows that share the positions equally."""
    each = min(arguments.positions // arguments.rows, arguments.length)
    grid = np.full((arguments.rows, arguments.length), arguments.positions - 1, np.int32)
    cells = np.full(arguments.positions, arguments.length - 1, np.int32)
    for row in range(arguments.rows):
        own = np.arange(row * each, (row + 1) * each)
        grid[row, :each] = own
        cells[own] = row * arguments.length + np.arange(each)
    count = arguments.positions * 2 // 3  # trained, as in a chat set
    return SimpleNamespace(
        grid=mx.array(grid),
        cells=mx.array(cells),
        prefix=0,
        groups=0,
        targets=mx.arange(count + 1) % arguments.vocabulary,
        weights=mx.ones(count + 1),
    )


def parts_of(model: Any, batch: Any, arguments: argparse.Namespace) -> list[Part]:
    """The parts in the order of the block, then the block and the head."""
    layer, dtype = model.model.layers[0], getattr(mx, arguments.dtype)
    attention, mlp = layer.self_attn, layer.mlp
    places = Rows.of(batch)

    def values(*shape: int) -> mx.array:
        return (mx.random.normal(shape) * 0.5).astype(dtype)

    x, wide = values(arguments.positions, arguments.hidden), values(arguments.positions, int(arguments.hidden * 3.5))
    narrow = values(arguments.positions, arguments.hidden // 4)
    predicting = batch.targets.size
    heads = places.heads(attention, x, narrow, narrow)

    def within(*heads: mx.array) -> mx.array:
        return attend(*heads, scale=attention.scale)[0]

    return [
        ("two norms", lambda x: layer.post_attention_layernorm(layer.input_layernorm(x)), [x]),
        ("products q, k, v", lambda x: project(x, attention.q_proj, attention.k_proj, attention.v_proj), [x]),
        ("rows for attention, with RoPE", lambda q, k, v: places.heads(attention, q, k, v), [x, narrow, narrow]),
        ("attention", within, list(heads)),
        ("positions again", places.positions, [within(*heads)]),
        ("product o", lambda x: project(x, attention.o_proj), [x]),
        ("products gate, up", lambda x: project(x, mlp.gate_proj, mlp.up_proj), [x]),
        ("SwiGLU", swiglu, [wide, values(*wide.shape)]),
        ("product down", lambda x: project(x, mlp.down_proj), [wide]),
        ("the block", lambda x: block(layer, x, places), [x]),
        ("the head's loss", lambda x: head_loss(model, x, batch, arguments.vocabulary).total, [x[:predicting]]),
    ]


def call_of(model: Any, part: Part) -> Call:
    """A forward and a backward pass, compiled: the outputs, and the gradients of inputs and adapters."""
    _, function, inputs = part
    adapters: Any = dict(tree_flatten(model.trainable_parameters()))

    def called(*values: mx.array) -> list[mx.array]:
        model.update(tree_unflatten(list(zip(adapters, values[len(inputs) :], strict=True))))
        result = function(*values[: len(inputs)])
        return list(result) if isinstance(result, (tuple, list)) else [result]

    def both(*values: mx.array) -> Any:
        cotangents = [mx.ones_like(output) for output in called(*values)]
        return mx.vjp(called, list(values), cotangents)

    compiled = mx.compile(both)
    values = [*inputs, *adapters.values()]
    mx.eval(compiled(*values))
    model.update(tree_unflatten(list(adapters.items())))
    return lambda: compiled(*values)


def seconds(call: Call, rounds: int) -> float:
    """The median time of a call, of several that are dispatched at once."""
    times = []
    for _ in range(rounds + 1):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(4):
            mx.async_eval(call())
        mx.synchronize()
        times.append((time.perf_counter() - start) / 4)
    return float(np.median(times[1:]))


def lasting(call: Call, for_s: float) -> float:
    """The mean time of a call in the second half of so many seconds without a pause."""
    times, start = [], time.perf_counter()
    while time.perf_counter() - start < for_s:
        for _ in range(8):
            mx.async_eval(call())
        mx.synchronize()
        times.append(time.perf_counter())
    middle = len(times) // 2
    return (times[-1] - times[middle]) / (8 * max(len(times) - 1 - middle, 1))


def large_product(arguments: argparse.Namespace) -> tuple[Call, float]:
    """One large product, and its operations."""
    size = 8192 if arguments.hidden > 1024 else 1024
    a, b = (mx.random.normal((size, size)).astype(getattr(mx, arguments.dtype)) for _ in range(2))
    return (lambda: a @ b.T), 2.0 * size**3


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--targets", choices=["none", *TARGETS], default="qv")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    model, batch = make_model(arguments), make_batch(arguments)
    hidden, positions = arguments.hidden, arguments.positions
    operations = 4 * positions * hidden**2
    work = {"products q, k, v": 1.5, "product o": 1, "products gate, up": 7, "product down": 3.5}
    work |= {"the block": sum(work.values()), "the head's loss": arguments.vocabulary / hidden * 2 / 3}
    print(f"{runtime.device_name()}, {arguments.dtype}, {positions:,} positions, adapters on {arguments.targets}\n")
    print("| forward and backward | ms | share of the block | TFLOP/s of its frozen products |\n|---|---|---|---|")
    calls = {part[0]: call_of(model, part) for part in parts_of(model, batch, arguments)}
    times = {name: seconds(call, arguments.rounds) for name, call in calls.items()}
    for name, taken in times.items():
        rate = f"{work[name] * operations / taken / 1e12:.3g}" if name in work else ""
        share = "" if name == "the head's loss" else f"{taken / times['the block']:.2f}"
        print(f"| {name} | {1000 * taken:.3f} | {share} | {rate} |")
    product, count = large_product(arguments)
    mx.eval(product())
    told = {"one large product": (product, count), "the block": (calls["the block"], work["the block"] * operations)}
    print(f"\n| | TFLOP/s, some calls | for {arguments.seconds:.0f} s |\n|---|---|---|")
    for name, (call, count) in told.items():
        rates = [count / taken / 1e12 for taken in (seconds(call, 9), lasting(call, arguments.seconds))]
        print(f"| {name} | {rates[0]:.3g} | {rates[1]:.3g} |")


if __name__ == "__main__":
    main()
