"""What a run leaves besides its files."""

from collections.abc import Mapping

import attrs

from mlx_trainer.evaluation import EvalMetrics


@attrs.frozen
class TrainingResult:
    """How a run ended."""

    steps: int
    epochs: int
    """Epochs completed."""
    stop_reason: str
    seconds: float
    metrics: Mapping[str, float]
    """The last logged values by TensorBoard tag."""
    evaluation: EvalMetrics | None
    """The last evaluation."""
    counts: Mapping[str, int]
