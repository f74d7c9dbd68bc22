"""Attention for training, forward and backward, in rows of several lengths with as many tokens in all.

python benchmarks/attention.py                     # a GPU: 8,192 tokens, 32 heads of 128, 8 of keys and values
python benchmarks/attention.py --tokens 512 --heads 4 --dtype float32
"""

import argparse
import time

import mlx.core as mx
import numpy as np

LENGTHS = (64, 72, 96, 112, 128, 176, 192, 256, 304, 320, 384, 448, 512, 624, 640, 904, 1024, 1536)


def attend(queries: mx.array, keys: mx.array) -> list[mx.array]:
    """Gradients of causal attention."""

    def forward(queries: mx.array, keys: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, keys, keys, scale=0.1, mask="causal")

    return mx.vjp(forward, [queries, keys], [queries])[1]


def main() -> None:
    """Print milliseconds for each length, and as a ratio to the quickest token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    compiled = mx.compile(attend)
    told = []
    for length in [n for n in LENGTHS if n <= arguments.tokens]:
        rows = max(arguments.tokens // length, 1)
        queries, keys = (
            mx.random.normal((rows, heads, length, 128)).astype(getattr(mx, arguments.dtype))
            for heads in (arguments.heads, max(arguments.heads // 4, 1))
        )
        mx.eval(queries, keys)
        times = []
        for _ in range(12):
            start = time.perf_counter()
            mx.eval(compiled(queries, keys))
            times.append(time.perf_counter() - start)
        told.append((length, rows, float(np.median(times[2:]))))
    print("| rows x length | ms | µs a token |\n|---|---|---|")
    for length, rows, seconds in told:
        print(f"| {rows}x{length} | {1e3 * seconds:.3f} | {1e6 * seconds / (rows * length):.3f} |")


if __name__ == "__main__":
    main()
