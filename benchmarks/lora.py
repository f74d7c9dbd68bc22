"""The linear layers of one Llama block with LoRA: separate layers, `project`, and other ways to write the same.

    python benchmarks/lora.py                                      # a small shape, on a CPU
    python benchmarks/lora.py --positions 8192 --hidden 4096 --dtype bfloat16 --targets all     # Mistral 7B, on a GPU

Each group of layers with one input (q, k, v; o; gate, up; down) runs forward and backward, compiled, all ways in turns;
the quickest of the rounds. The limit is the products with the frozen weights alone, nothing added up. The peak is what
forward and backward of the largest group take above its inputs. With `--dropout`, drawing one mask (positions, hidden)
is timed too. On a CPU MLX's kernels are compiled first, in a minute or so.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer import runtime
from mlx_trainer.models import products
from mlx_trainer.models.lora import LoRALinear, project
from mlx_trainer.models.quantized import dequantize_at_use

Call = Callable[[], Any]
GROUPS = {"q, k, v": "qkv", "o": "o", "gate, up": "gu", "down": "d"}
TARGETS = {"all": "qkvogud", "qv": "qv", "none": ""}


def widths(hidden: int) -> dict[str, tuple[int, int]]:
    """(in, out) of each layer, in Mistral 7B's proportions."""
    inner = hidden * 7 // 2
    square = (hidden, hidden)
    narrow = (hidden, hidden // 4)
    return {"q": square, "k": narrow, "v": narrow, "o": square, "g": (hidden, inner), "u": (hidden, inner)} | {
        "d": (inner, hidden)
    }


def layer_of(name: str, arguments: argparse.Namespace) -> nn.Module:
    """A frozen layer, with an adapter where it is a target."""
    inputs, outputs = widths(arguments.hidden)[name]
    linear: Any = nn.Linear(inputs, outputs, bias=False)
    linear.set_dtype(getattr(mx, arguments.dtype))
    if arguments.bits:
        linear = dequantize_at_use(nn.QuantizedLinear.from_linear(linear, 64, arguments.bits))
    linear.freeze()
    if name not in TARGETS[arguments.targets]:
        return linear
    layer = LoRALinear(linear, rank=arguments.rank, scale=2.0, dropout=arguments.dropout, key=mx.random.key(0))
    layer.lora_b = mx.random.normal(layer.lora_b.shape) * 0.01
    return layer


def separate(x: mx.array, *layers: Any) -> Sequence[mx.array]:
    """Each layer as it is called by itself."""
    return [layer(x) for layer in layers]


def low_first(linear: Any, x: mx.array, low: mx.array, b: mx.array) -> mx.array:
    """The adapter's product first, and the large one added to it: y is not read again by a product of its own."""
    return mx.addmm(low @ b, x, linear.weight.T)


def each_alone(adapters: Sequence[products.Adapter]) -> list[list[products.Adapter]]:
    """No product of an adapter is shared."""
    return [[adapter] for adapter in adapters]


def added(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """A sum apart from its product, which compilation joins with its neighbours."""
    return c + a @ b


def ways(arguments: argparse.Namespace) -> dict[str, tuple[Callable[..., Any], Any]]:
    """How to compute a group, and what is put in its place meanwhile."""
    told: dict[str, tuple[Callable[..., Any], Any]] = {
        "separate layers": (separate, nullcontext),
        "`project`": (project, nullcontext),
        "each x @ a alone": (project, lambda: patch.object(products, "sharing", each_alone)),
        "sums apart from products": (project, lambda: patch.object(mx, "addmm", added)),
    }
    if not arguments.bits:
        told["adapter first"] = (project, lambda: patch.object(products, "with_adapter", low_first))
    return told


def step_of(way: Callable[..., Any], layers: Sequence[Any], x: mx.array, dys: Sequence[mx.array]) -> Call:
    """Outputs, and the gradients of x and the adapters, compiled; dropout is drawn anew at each call."""
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    masters = [array for layer in adapted for array in (layer.lora_a, layer.lora_b)]

    def outputs(x: mx.array, *adapters: mx.array) -> list[mx.array]:
        for layer, a, b in zip(adapted, adapters[::2], adapters[1::2], strict=True):
            layer.lora_a, layer.lora_b = a, b
        return list(way(x, *layers))

    def step(primals: list[mx.array], dys: list[mx.array]) -> Any:
        return mx.vjp(outputs, primals, dys)

    compiled = mx.compile(step, inputs=mx.random.state, outputs=mx.random.state)
    return lambda: compiled([x, *masters], list(dys))


def limit_of(layers: Sequence[Any], x: mx.array, dys: Sequence[mx.array]) -> Call:
    """The products with the frozen weights, forward and backward, and nothing else."""
    linears = [layer.linear if isinstance(layer, LoRALinear) else layer for layer in layers]

    def step(x: mx.array, dys: list[mx.array]) -> Any:
        return [mx.vjp(linear, [x], [dy]) for linear, dy in zip(linears, dys, strict=True)]

    compiled = mx.compile(step)
    return lambda: compiled(x, list(dys))


def calls_of(group: str, arguments: argparse.Namespace) -> dict[str, tuple[Call, Any]]:
    """For each way, a group's step and what stands in a place of the package's while it is traced."""
    layers = [layer_of(name, arguments) for name in group]
    shapes = [widths(arguments.hidden)[name] for name in group]
    dtype = getattr(mx, arguments.dtype)
    x = mx.random.normal((arguments.positions, shapes[0][0])).astype(dtype)
    dys = [mx.random.normal((arguments.positions, outputs)).astype(dtype) for _, outputs in shapes]
    mx.eval(x, dys, layers)
    calls: dict[str, tuple[Call, Any]] = {"limit": (limit_of(layers, x, dys), nullcontext)}
    return calls | {name: (step_of(way, layers, x, dys), inside) for name, (way, inside) in ways(arguments).items()}


def milliseconds(call: Call, inside: Any, repeat: int) -> float:
    """One call of several that are dispatched at once, so that a GPU does not wait for the host."""
    start = time.perf_counter()
    with inside():
        mx.eval([call() for _ in range(repeat)])
    return (time.perf_counter() - start) * 1e3 / repeat


def peak_gb(call: Call, inside: Any) -> float:
    """What one call takes above what is held before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with inside():
        mx.eval(call())
    return (mx.get_peak_memory() - before) / 1e9


def measured(group: str, arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The fewest milliseconds, and peak GB, of each way."""
    calls = calls_of(group, arguments)
    for call, inside in calls.values():
        milliseconds(call, inside, 1)  # traced and compiled
    peaks = {name: peak_gb(*call) for name, call in calls.items()}
    rounds = [
        {name: milliseconds(*call, arguments.repeat) for name, call in calls.items()} for _ in range(arguments.rounds)
    ]
    return {name: (min(times[name] for times in rounds), peaks[name]) for name in calls}


def masks_ms(arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to draw one mask, (positions, hidden), by the package and by `mx.random.bernoulli`."""
    shape, key = (arguments.positions, arguments.hidden), mx.random.key(1)
    ways = {
        "16 bits": mx.compile(lambda key: products.kept(shape, arguments.dropout, key)[0]),
        "`bernoulli`": mx.compile(lambda key: mx.random.bernoulli(1 - arguments.dropout, shape, key=key)),
    }
    calls = {name: (lambda draw=draw: draw(key)) for name, draw in ways.items()}
    rounds = [
        {name: milliseconds(call, nullcontext, arguments.repeat) for name, call in calls.items()}
        for _ in range(1 + arguments.rounds)
    ]
    return {name: min(times[name] for times in rounds[1:]) for name in calls}


def main() -> None:
    """Print the table."""
    arguments = parsed()
    start = time.perf_counter()
    print(f"{runtime.device_name()} ({runtime.backend()}), {vars(arguments)}\n")
    columns = {title: measured(group, arguments) for title, group in GROUPS.items()}
    print("| ms | " + " | ".join(columns) + " | all | of the limit | peak GB |\n" + "|---" * (len(columns) + 4) + "|")
    limit = sum(column["limit"][0] for column in columns.values())
    for name in columns["o"]:
        times = [column[name][0] for column in columns.values()]
        peak = max(column[name][1] for column in columns.values())
        cells = [*(f"{ms:.3f}" for ms in times), f"{sum(times):.3f}", f"{sum(times) / limit:.3f}", f"{peak:.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if arguments.dropout:
        print("\nms to draw a mask: " + ", ".join(f"{name} {ms:.3f}" for name, ms in masks_ms(arguments).items()))
    print(f"\n{time.perf_counter() - start:.0f} s")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bits", type=int, help="a packed base; --hidden is then a multiple of 128")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeat", type=int, default=2, help="calls dispatched at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
