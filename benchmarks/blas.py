"""Float32 matrix products through MLX on a Linux CPU, with the wheel's own BLAS and with the one mlx_trainer brings.

    python benchmarks/blas.py

Each setting runs in a process of its own, in turns; the median of all rounds is printed.
"""

import os
import statistics
import subprocess
import sys

ROUNDS, SIZE = 5, 1024
CODE = """
import time, mlx_trainer.runtime as runtime
import mlx_trainer, mlx.core as mx
a, b = mx.random.normal((SIZE, SIZE), key=mx.random.key(0)), mx.random.normal((SIZE, SIZE), key=mx.random.key(1))
mx.eval(a, b, a @ b)
start, count = time.perf_counter(), 0
while time.perf_counter() - start < 1:
    mx.eval(a @ b)
    count += 1
print(2 * SIZE**3 * count / (time.perf_counter() - start) / 1e9, runtime.blas_report(), sep="|")
""".replace("SIZE", str(SIZE))


def measure(blas: str) -> tuple[float, str]:
    """GFLOP/s and the line that says which BLAS it was."""
    environment = {**os.environ, "MLX_TRAINER_BLAS": blas}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    speed, report = done.stdout.strip().split("|")
    return float(speed), report


def main() -> None:
    """Measure in turns and print the medians."""
    rounds = [(measure("off"), measure("")) for _ in range(ROUNDS)]
    own, ours = ([each[i][0] for each in rounds] for i in (0, 1))
    print(f"{statistics.median(own):8.1f} GFLOP/s  {rounds[0][0][1]}")
    print(f"{statistics.median(ours):8.1f} GFLOP/s  {rounds[0][1][1]}")
    print(f"{statistics.median(b / a for a, b in zip(own, ours, strict=True)):8.1f} times, median of {ROUNDS} rounds")


if __name__ == "__main__":
    main()
