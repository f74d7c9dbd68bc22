"""A packed layer: MLX's `quantized_matmul`, dequantizing at use (`models/quantized.py`), and a dense layer beside them.

    python benchmarks/quantized.py
    python benchmarks/quantized.py --sizes 4096x4096 4096x14336 --rows 1 16 64 128 256 512 2048 8192

Forward, and forward with the gradient of x, compiled; the three take turns, medians. Under each table stands from how
many rows on dequantizing wins here, which `runtime.DEQUANTIZE_FROM_ROWS` rests on. Sizes are in x out.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer import runtime
from mlx_trainer.models.quantized import dequantized_matmul

Call = Callable[[mx.array, mx.array], Any]
KINDS = ("dense", "quantized_matmul", "dequantized")


def main() -> None:
    """Measure every size."""
    arguments = parsed()
    dtype = getattr(mx, arguments.dtype)
    print(f"{runtime.device_name()} ({runtime.backend()}), {arguments.dtype}, {arguments.bits} bits, {arguments.mode}")
    for inputs, outputs in arguments.sizes:
        dense = nn.Linear(inputs, outputs, bias=False)
        packed = nn.QuantizedLinear.from_linear(dense, arguments.group_size, arguments.bits, mode=arguments.mode)
        for layer in (dense, packed):
            layer.set_dtype(dtype)
        mx.eval(dense, packed)
        ways = (dense, packed, lambda x, packed=packed: dequantized_matmul(x, packed))
        calls = [forward(way) for way in ways] + [with_gradient(way) for way in ways]
        print(f"\n{inputs}x{outputs}, ms{'forward':>24}{'forward and backward':>46}")
        print(f"{'rows':>6}" + "".join(f"{kind:>18}" for kind in KINDS) * 2)
        table = [measured(calls, rows, inputs, outputs, dtype, arguments) for rows in arguments.rows]
        for name, at in (("forward", 0), ("forward and backward", 3)):
            wins = crossover(arguments.rows, [(row[at + 1], row[at + 2]) for row in table])
            print(f"{name}: dequantizing wins {wins}")
    print(f"\nruntime dequantizes from {runtime.DEQUANTIZE_FROM_ROWS[runtime.backend()]} rows")


def forward(layer: Callable[[mx.array], mx.array]) -> Call:
    """The layer alone."""
    return mx.compile(lambda x, cotangent: layer(x))


def with_gradient(layer: Callable[[mx.array], mx.array]) -> Call:
    """The layer, and what flows back through it."""
    return mx.compile(lambda x, cotangent: mx.vjp(layer, [x], [cotangent]))


def measured(
    calls: Sequence[Call], rows: int, inputs: int, outputs: int, dtype: mx.Dtype, arguments: argparse.Namespace
) -> list[float]:
    """Print and return the median milliseconds of each call for that many rows."""
    x, cotangent = mx.random.normal((rows, inputs)).astype(dtype), mx.random.normal((rows, outputs)).astype(dtype)
    mx.eval(x, cotangent)
    rounds = [[milliseconds(call, x, cotangent, arguments.repeat) for call in calls] for _ in range(arguments.rounds)]
    medians = [statistics.median(times) for times in zip(*rounds[1:], strict=True)]  # the first one compiles
    print(f"{rows:6}" + "".join(f"{median:18.3f}" for median in medians), flush=True)
    return medians


def milliseconds(call: Call, x: mx.array, cotangent: mx.array, repeat: int) -> float:
    """One call of several that are dispatched at once, so that a GPU does not wait for the host."""
    start = time.perf_counter()
    mx.eval([call(x, cotangent) for _ in range(repeat)])
    return (time.perf_counter() - start) * 1e3 / repeat


def crossover(rows: Sequence[int], pairs: Sequence[tuple[float, float]]) -> str:
    """From which of `rows` on the second time of each pair is the smaller one."""
    wins = [count for count, (packed, dequantized) in zip(rows, pairs, strict=True) if dequantized >= packed]
    later = [count for count in rows if count > max(wins, default=0)]
    return f"from {later[0]} of the measured rows on" if later else "nowhere"


def parsed() -> argparse.Namespace:
    """The command line; the defaults take ten seconds on two CPU cores, bfloat16 a minute."""
    gpu = runtime.backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=size, default=[(512, 512), (512, 1024)], metavar="INxOUT")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 256])
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, help="default: the mode's")
    parser.add_argument("--mode", default="affine", help="affine, mxfp4, nvfp4 or mxfp8")
    parser.add_argument("--rounds", type=int, default=8, help="the first is not counted")
    parser.add_argument("--repeat", type=int, default=8 if gpu else 1, help="calls dispatched at once")
    return parser.parse_args()


def size(text: str) -> tuple[int, int]:
    """`512x1024` as numbers."""
    inputs, _, outputs = text.partition("x")
    return int(inputs), int(outputs)


if __name__ == "__main__":
    main()
