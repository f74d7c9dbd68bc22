"""Cross-entropy with its gradient, as MLX has it and as `models/loss.py` computes it, and what an exponential costs.

    python benchmarks/cross_entropy.py
    python benchmarks/cross_entropy.py --positions 1024 --vocabulary 32768 --dtype bfloat16    # on a GPU

The two take turns; medians, and the median ratio of the rounds. By itself 768 positions over a vocabulary of 1,024,
float32: the shape of the quick start's base. On a GPU MLX's own kernel is what is used, beside what a CPU uses.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer import runtime
from mlx_trainer.models.exponential import exp
from mlx_trainer.models.loss import cross_entropy, keeping_exponentials

ROUNDS = 25


def milliseconds(function: Callable[[], object]) -> float:
    """One call, computed."""
    start = time.perf_counter()
    mx.eval(function())
    return (time.perf_counter() - start) * 1e3


def compare(name: str, theirs: Callable[[], object], ours: Callable[[], object]) -> None:
    """Print the medians of both and the ratio."""
    milliseconds(theirs), milliseconds(ours)
    rounds = [(milliseconds(theirs), milliseconds(ours)) for _ in range(ROUNDS)]
    first, second = (statistics.median(each) for each in zip(*rounds, strict=True))
    print(f"{name:32}{first:9.2f}{second:12.2f}{statistics.median(a / b for a, b in rounds):9.2f}")


def with_gradient(loss: Callable[[mx.array, mx.array], mx.array], targets: mx.array) -> Callable[[mx.array], object]:
    """The summed loss and its gradient, compiled."""
    return mx.compile(mx.value_and_grad(lambda logits: loss(logits, targets).sum()))


def main() -> None:
    """Measure both pairs, and on a GPU the two kinds of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--positions", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    logits = mx.random.normal((arguments.positions, arguments.vocabulary)).astype(getattr(mx, arguments.dtype))
    targets = mx.random.randint(0, arguments.vocabulary, (arguments.positions,))
    below = -mx.abs(logits)
    mx.eval(logits, targets, below)
    plain, once = with_gradient(nn.losses.cross_entropy, targets), with_gradient(cross_entropy, targets)
    print(f"{'ms':32}{'MLX':>9}{'mlx_trainer':>12}{'ratio':>9}")
    compare(f"exp of {logits.size:,} elements", lambda: mx.exp(below), mx.compile(lambda: exp(below)))
    compare("cross-entropy and gradient", lambda: plain(logits), lambda: once(logits))
    if runtime.backend() != "cpu":
        kept = with_gradient(keeping_exponentials, targets)
        compare("exponentials kept; one kernel", lambda: kept(logits), lambda: once(logits))


if __name__ == "__main__":
    main()
