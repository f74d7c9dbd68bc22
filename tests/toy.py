"""A tiny model that is no language model: regression with dropout, rows of unequal weight, batches of unequal size."""

from collections.abc import Sequence
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np

from mlx_trainer import LossOutput, TrainerModule

FEATURES = 6


@attrs.frozen(eq=False)
class ToyMetadata:
    rows: tuple[str, ...]


@attrs.frozen(eq=False)
class ToyBatch:
    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    metadata: ToyMetadata | None


def toy_batches(sizes: Sequence[int] = (4, 3, 4, 2, 4, 4, 3), seed: int = 0) -> list[ToyBatch]:
    """Distinct rows `rows.jsonl:1`, …; each row has a weight from 1 to 5, as a row has its number of tokens."""
    rng, line, batches = np.random.default_rng(seed), 1, []
    for size in sizes:
        rows = tuple(f"rows.jsonl:{line + i}" for i in range(size))
        x = rng.normal(size=(size, FEATURES)).astype(np.float32)
        y = (x.sum(axis=1) + rng.normal(size=size) / 10).astype(np.float32)
        batches.append(ToyBatch(x, y, rng.integers(1, 6, size).astype(np.float32), ToyMetadata(rows)))
        line += size
    return batches


def with_nan(batch: ToyBatch) -> ToyBatch:
    """The same rows, one number of them poisoned."""
    x = batch.x.copy()
    x[0, 0] = np.nan
    return attrs.evolve(batch, x=x)


class ToyModule(TrainerModule):
    """A two-layer regression; weighted squared error."""

    def __init__(self, dropout: float = 0.2, learning_rate: float = 1e-2) -> None:
        self.dropout, self.learning_rate = dropout, learning_rate

    def setup(self, stage: str) -> None:
        if not hasattr(self, "model"):
            mx.random.seed(7)
            self.model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(self.dropout), nn.Tanh(), nn.Linear(8, 1))

    def training_loss(self, batch: ToyBatch) -> LossOutput:
        error = self.model(batch.x)[:, 0] - batch.y
        total = (mx.square(error) * batch.weight).sum()
        return LossOutput(total, batch.weight.sum(), {"absolute_error": (mx.abs(error) * batch.weight).sum()})

    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        return optimizers.AdamW(self.learning_rate, bias_correction=True)

    def count(self, batch: ToyBatch) -> dict[str, int]:
        return {"rows": len(batch.y)}

    def predict(self, batch: ToyBatch) -> mx.array:
        return self.model(batch.x)[:, 0]


class ToyLoader:
    """Shuffles by (seed, epoch) and knows its position, as a resumable loader does."""

    def __init__(self, batches: Sequence[ToyBatch], seed: int = 3) -> None:
        self.batches, self.seed, self.epoch, self.position = batches, seed, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.batches))
        while self.position < len(order):
            self.position += 1
            yield self.batches[order[self.position - 1]]
        self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def weights(module: TrainerModule) -> dict[str, list[Any]]:
    """All parameters as nested lists, comparable with ==."""
    from mlx.utils import tree_flatten

    return {name: array.tolist() for name, array in tree_flatten(module.model.parameters())}
