"""Where a run stands: what a checkpoint holds beside parameters and optimizer state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import mlx.core as mx


@attrs.define
class TrainingState:
    """The position of a run. Counts are totals since step 1, over all resumed parts."""

    step: int = 0
    """Optimizer updates done."""
    epoch: int = 0
    position: int = 0
    """Micro-batches of this epoch already used."""
    counts: dict[str, int] = attrs.field(factory=dict)
    """Sums of `module.count(batch)`, such as {"tokens": 81920}."""
    seconds: float = 0.0
    """Time spent in `fit`."""
    metrics: dict[str, float] = attrs.field(factory=dict)
    """The last logged values, so that a finished run that is resumed gives the same result."""
    evaluation: Any = None
    """The last evaluation, an `EvalMetrics`."""
    loader: dict[str, Any] | None = None
    """What a resumable loader said of its position when the last step was dispatched; it may be ahead of that."""

    def consume(self, micro_batches: Sequence[Mapping[str, int]], loader: dict[str, Any] | None = None) -> None:
        """One more step, made of micro-batches of these sizes; `loader` is the loader's own position after them."""
        self.step, self.loader = self.step + 1, loader
        self.position += len(micro_batches)
        for sizes in micro_batches:
            for name, size in sizes.items():
                self.counts[name] = self.counts.get(name, 0) + size

    def next_epoch(self, loader: dict[str, Any] | None = None) -> None:
        """The first position of the next epoch."""
        self.epoch, self.position, self.loader = self.epoch + 1, 0, loader


def random_state() -> int:
    """MLX's random state of this thread as one number; reads the device."""
    return key_to_seed(random_key())


def random_key() -> mx.array:
    """This thread's random state as an array of two uint32; reads nothing."""
    return mx.random.state[0]  # type: ignore[index, no-any-return]


def restore_random_state(seed: int) -> None:
    """Put back what `random_state` gave, exactly (mlx 0.32.1 and later)."""
    mx.random.seed(seed)


def key_to_seed(key: mx.array) -> int:
    """The 64-bit seed which makes `key`, an array of two uint32."""
    high, low = key.tolist()  # type: ignore[misc]
    return (int(high) << 32) | int(low)  # type: ignore[arg-type]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace in the training run's randomness."""
    seed = random_state()
    try:
        yield
    finally:
        restore_random_state(seed)
