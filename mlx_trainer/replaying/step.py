"""What is told of a step that was taken again."""

from collections.abc import Mapping
from typing import Any

from attrs import asdict, frozen

from mlx_trainer.data import Example


@frozen
class ReplayedRow:
    """A row of the step; `loss` is the mean over its trained tokens, in nats, or that of the pair it belongs to."""

    source: str
    loss: float
    trained_tokens: int
    example: Example


@frozen
class ReplayedStep:
    """What one step was.

    `begun_at` is the step of the checkpoint from which the run was taken up, 0 its start. `loss` is the mean over all
    trained tokens, `values` what transforms reported, such as `grad_norm`. `gradient_norms` are those of the gradient
    before any transform, by layer. `logged` tells at which logged steps on the way the loss was compared with the run's
    own, and whether it was the same bit for bit; `checkpoint_equal` the same of the parameters after the step, None
    where there is no checkpoint of it.
    """

    step: int
    epoch: int
    begun_at: int
    loss: float
    accepted: bool
    learning_rate: float | None
    values: Mapping[str, float]
    rows: tuple[ReplayedRow, ...]
    gradient_norms: Mapping[str, float]
    logged: Mapping[int, bool]
    checkpoint_equal: bool | None

    def as_dict(self) -> dict[str, Any]:
        """The step as JSON values; rows in the order of the batch, their trained text between ⟦ and ⟧."""
        return asdict(self) | {"rows": [asdict(row) | {"example": row.example.plain()} for row in self.rows]}
