"""A world whose time passes only where a test says so."""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_trainer import Callback
from tests.toy import ToyBatch, ToyModule


class World:
    """Two clocks: `now` is the wall's, `cpu` this thread's."""

    def __init__(self) -> None:
        self.wall = self.thread = 0.0

    def now(self) -> float:
        return self.wall

    def cpu(self) -> float:
        return self.thread

    def work(self, seconds: float) -> None:
        """This thread computes."""
        self.wall += seconds
        self.thread += seconds

    def wait(self, seconds: float) -> None:
        """This thread waits."""
        self.wall += seconds


class SlowBatches:
    """Batches that take 2 s each to make; the first of an epoch 1 s more."""

    def __init__(self, world: World, batches: Sequence[ToyBatch]) -> None:
        self.world, self.batches = world, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ToyBatch]:
        self.world.work(1)
        for batch in self.batches:
            self.world.work(2)
            yield batch


class SlowDevice(Callback):
    """Stands behind the clock: a step costs 1 s to dispatch, after 3 s in the queue, and the host waits 4 s for it.

    Where a shape is new, dispatching takes 10 s more.
    """

    def __init__(self, world: World, new_shapes: Sequence[int]) -> None:
        self.world, self.new_shapes = world, new_shapes

    def on_step_start(self, trainer: Any, module: Any, step: int) -> None:
        self.world.work(1 + 10 * (step in self.new_shapes))
        self.world.wait(3)

    def on_step_dispatched(self, trainer: Any, module: Any, step: int) -> None:
        self.world.wait(4)


class CountingModule(ToyModule):
    """Ten tokens a row, six of them trained, in sixteen positions."""

    def count(self, batch: ToyBatch) -> dict[str, int]:
        rows = len(batch.y)
        return {"rows": rows, "tokens": 10 * rows, "trained_tokens": 6 * rows, "positions": 16 * rows}
