"""A regression small enough that a run takes milliseconds: uneven batches, dropout, rows with names."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from attrs import frozen
from mlx.utils import tree_flatten

from mlx_trainer.callback import Callback
from mlx_trainer.module import LossOutput, TrainerModule
from mlx_trainer.state import preserved_random_state
from mlx_trainer.trainer import Trainer

BATCHES = 6


@frozen
class Rows:
    rows: tuple[str, ...]


@frozen(eq=False)
class ToyBatch:
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    metadata: Rows


class Regression(TrainerModule):
    """Two layers with dropout between them; it can "generate", drawing random numbers as a language model may."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def setup(self, stage: str) -> None:
        """Build the same initial weights each time."""
        if not hasattr(self, "model"):
            with preserved_random_state():
                mx.random.seed(7)
                self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.relu, nn.Linear(8, 1))

    def training_loss(self, batch: Any) -> LossOutput:
        """Return the sum of squared errors."""
        error = self.model(batch.x)[:, 0] - batch.y
        return LossOutput(mx.square(error).sum(), mx.array(error.size, mx.float32))

    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        """Return an optimizer with state that a skipped step could spoil."""
        return optimizers.AdamW(learning_rate=1e-2, bias_correction=True)

    def count(self, batch: Any) -> Mapping[str, int]:
        """Count rows, and as tokens the numbers in them."""
        return {"rows": len(batch.y), "tokens": batch.x.size}

    def generate(
        self, prompts: Sequence[Any], *, max_tokens: int = 8, temperature: float = 0.0, timeout_s: float | None = None
    ) -> list[str]:
        """Answer with what was asked for, after disturbing the random state."""
        mx.eval(mx.random.normal((3,)))
        self.answers.append(self.model.training)
        return [f"{prompt!s:.20} {max_tokens} {temperature} {timeout_s}" for prompt in prompts]


def batches(count: int = BATCHES, seed: int = 0, nan_at: int | None = None) -> list[ToyBatch]:
    """Return batches of 2 to 4 distinct rows; those of batch `nan_at` have a NaN."""
    generator = np.random.default_rng(seed)
    made = []
    for index in range(count):
        size = 2 + index % 3
        x = generator.normal(size=(size, 4)).astype(np.float32)
        y = x.sum(axis=1) + generator.normal(size=size).astype(np.float32)
        if index == nan_at:
            y[1] = np.nan
        made.append(
            ToyBatch(x, y.astype(np.float32), Rows(tuple(f"toy.jsonl:{10 * index + row}" for row in range(size))))
        )
    return made


class Snapshots(Callback):
    """Parameters and optimizer state after each step, copied."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, bytes]] = {}

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Read everything; a test may."""
        self.after[step] = state_bytes(trainer, module)


def state_bytes(trainer: Trainer, module: TrainerModule) -> dict[str, bytes]:
    """Return every parameter and every part of the optimizer state as bytes."""
    tree = {"model": module.model.parameters(), "optimizer": trainer.optimizer.state}
    return {name: np.array(array).tobytes() for name, array in dict(tree_flatten(tree)).items()}


def fit(callbacks: Sequence[Callback], data: Any = None, validation: Any = None, **options: Any) -> tuple[Trainer, Any]:
    """Train a fresh Regression and return the trainer and the result."""
    trainer = Trainer(callbacks=callbacks, **{"log_every": 2, **options})
    return trainer, trainer.fit(Regression(), data or batches(), validation)
