"""The Trainer knows no language model: here a plain `mlx.nn` network learns y = sin(3x)."""

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer import Evaluation, GradientClipping, LossOutput, Trainer, TrainerModule, TrainingResult


class Regression(TrainerModule):
    """Least squares; x and y are (rows, 1)."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_loss(self, batch: dict[str, mx.array]) -> LossOutput:
        """The summed squared error, and how many errors were summed."""
        errors = self.model(batch["x"]) - batch["y"]
        return LossOutput(total=mx.square(errors).sum(), weight=mx.array(errors.size, mx.float32))


def points(first: float, last: float, count: int) -> list[dict[str, mx.array]]:
    """Batches of 32 points on the curve."""
    x = mx.random.permutation(mx.linspace(first, last, count))[:, None]
    return [{"x": part, "y": mx.sin(3 * part)} for part in x.split(count // 32)]


def main() -> TrainingResult:
    """Train; the result's `evaluation.loss` is the mean squared error on points between the trained ones."""
    trainer = Trainer(max_epochs=100, callbacks=[GradientClipping(max_norm=1.0), Evaluation(every=400, at_start=True)])
    return trainer.fit(Regression(), points(-1, 1, 512), points(-0.99, 0.99, 64))


if __name__ == "__main__":
    print(main().evaluation)
