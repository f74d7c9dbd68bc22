"""What joining a block's frozen products would gain: q, k and v, or gate and up, as one, and sums inside a product.

    python benchmarks/products.py                                                     # Mistral-7B's shape; a GPU
    python benchmarks/products.py --positions 512 --hidden 256 --dtype float32        # on a CPU

Forward, and towards their input. Each is repeated for `--seconds` without a pause, since a GPU comes to the clocks that
it can keep.
"""

import argparse
from typing import Any

import mlx.core as mx
from block import Call, lasting

from mlx_trainer import runtime

Pair = tuple[Call, Call]


def pairs(positions: int, hidden: int, dtype: mx.Dtype) -> dict[str, Pair]:
    """By name, apart and joined."""
    narrow, wide = hidden // 4, hidden * 7 // 2

    def values(*shape: int) -> mx.array:
        array = (mx.random.normal(shape) * 0.5).astype(dtype)
        mx.eval(array)
        return array

    def joined(*arrays: mx.array, axis: int = 0) -> mx.array:
        whole = mx.concatenate(arrays, axis=axis)
        mx.eval(whole)
        return whole

    x, h, middle = values(positions, hidden), values(positions, hidden), values(positions, wide)
    q, k, v, o = (values(width, hidden) for width in (hidden, narrow, narrow, hidden))
    gate, up, down = values(wide, hidden), values(wide, hidden), values(hidden, wide)
    dq, dk, dv, dgate, dup = (values(positions, len(weight)) for weight in (q, k, v, gate, up))
    qkv, both = joined(q, k, v), joined(gate, up)
    dqkv, dboth = joined(dq, dk, dv, axis=1), joined(dgate, dup, axis=1)
    back: Any = mx.addmm
    return {
        "q, k, v": (lambda: [x @ q.T, x @ k.T, x @ v.T], lambda: x @ qkv.T),
        "towards their input": (lambda: back(back(dq @ q, dk, k), dv, v), lambda: dqkv @ qkv),
        "gate, up": (lambda: [x @ gate.T, x @ up.T], lambda: x @ both.T),
        "towards their input, too": (lambda: back(dgate @ gate, dup, up), lambda: dboth @ both),
        "o, and a sum": (lambda: h + x @ o.T, lambda: mx.addmm(h, x, o.T)),
        "down, and a sum": (lambda: h + middle @ down.T, lambda: mx.addmm(h, middle, down.T)),
    }


def main() -> None:
    """Measure each and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=2.5)
    arguments = parser.parse_args()
    print(f"{runtime.device_name()}, {runtime.backend()}: {vars(arguments)}\n")
    print("| ms | apart | joined | ratio |\n|---|---|---|---|")
    total = [0.0, 0.0]
    found = pairs(arguments.positions, arguments.hidden, getattr(mx, arguments.dtype))
    for name, calls in found.items():
        times = []
        for call in calls:
            mx.eval(call())
            times.append(1e3 * lasting(call, arguments.seconds))
        total = [sum(each) for each in zip(total, times, strict=True)]
        print(f"| {name} | {times[0]:.3f} | {times[1]:.3f} | {times[1] / times[0]:.3f} |", flush=True)
    print(f"| together | {total[0]:.3f} | {total[1]:.3f} | {total[1] / total[0]:.3f} |")


if __name__ == "__main__":
    main()
