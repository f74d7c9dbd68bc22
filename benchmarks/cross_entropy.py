"""Cross-entropy with its gradient, as MLX has it and as `models/loss.py` computes it, and what an exponential costs.

    python benchmarks/cross_entropy.py

The two take turns; medians, and the median ratio of the rounds. 768 positions over a vocabulary of 1,024, float32: the
shape of the quick start's base.
"""

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.models.exponential import exp
from mlx_trainer.models.loss import cross_entropy

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


def main() -> None:
    """Measure both pairs."""
    logits = mx.random.normal((768, 1024))
    targets = mx.random.randint(0, 1024, (768,))
    below = -mx.abs(logits)
    mx.eval(logits, targets, below)
    plain = mx.compile(mx.value_and_grad(lambda scores: nn.losses.cross_entropy(scores, targets).sum()))
    once = mx.compile(mx.value_and_grad(lambda scores: cross_entropy(scores, targets).sum()))
    print(f"{'ms':32}{'MLX':>9}{'mlx_trainer':>12}{'ratio':>9}")
    compare("exp of 786,432 elements", lambda: mx.exp(below), mx.compile(lambda: exp(below)))
    compare("cross-entropy and gradient", lambda: plain(logits), lambda: once(logits))


if __name__ == "__main__":
    main()
