"""Bounded gradients."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from mlx_trainer.callback import Callback, Gradients
from mlx_trainer.fusion import all_finite, on_its_own
from mlx_trainer.joined import Joined
from mlx_trainer.step import StepContext
from mlx_trainer.step import norm as norm_of


class GradientClipping(Callback):
    """Scales the gradients down where their global norm, in float32, exceeds `max_norm`; reports `train/grad_norm`.

        g * min(1, max_norm / (norm + 1e-6))

    as documented for `torch.nn.utils.clip_grad_norm_`. `max_value` first clips each element to
    [-max_value, max_value], as `torch.nn.utils.clip_grad_value_` does. The norm reported is that before any clipping.
    Where the norm is not finite no update is made: scaled by it, all gradients but the infinite ones would be 0.
    Raises ValueError for limits that are not positive, or without any.

    Costs nothing on the host: it is part of the compiled step, which reads each gradient once more for its norm.
    """

    def __init__(self, max_norm: float | None = 1.0, max_value: float | None = None) -> None:
        if max_norm is None and max_value is None:
            raise ValueError("GradientClipping clips nothing: give max_norm, max_value or both")
        for name, limit in (("max_norm", max_norm), ("max_value", max_value)):
            if limit is not None and not limit > 0:
                raise ValueError(f"GradientClipping: {name} is {limit}; it must be above 0")
        self.max_norm, self.max_value = max_norm, max_value

    def fingerprint(self) -> Mapping[str, Any]:
        """The limits."""
        return {"max_grad_norm": self.max_norm, "max_grad_value": self.max_value}

    def transform_gradients(
        self, gradients: Gradients, context: StepContext
    ) -> tuple[Gradients, Mapping[str, mx.array]]:
        """Return gradients within the limits, each in its own dtype, and the global norm they had."""
        # Without an earlier transform these are the arrays whose norm guards look at too, and it is computed once.
        joined = context.joined if gradients is context.gradients else Joined.of(gradients)
        before = norm = context.grad_norm if joined is context.joined else norm_of(joined.arrays)
        if (limit := self.max_value) is not None:
            joined = joined.map(lambda g: mx.clip(g, -limit, limit).astype(g.dtype))
            norm = norm_of(joined.arrays)
        scale = None if self.max_norm is None else scale_of(norm, self.max_norm)
        return joined.tree(scale), {"grad_norm": before}

    def accept_update(self, loss: mx.array, gradients: Gradients, context: StepContext) -> mx.array:
        """Whether the norm before any clipping was finite: scaled by another, the update would be nothing or NaN."""
        return mx.array(True) if self.max_norm is None else all_finite(context.reported["grad_norm"])


def scale_of(norm: mx.array, max_norm: float) -> mx.array:
    """The scalar that brings gradients, whose global norm is `norm`, to `max_norm`; NaN where `norm` is not finite."""
    ratio = on_its_own(max_norm / on_its_own(norm + 1e-6))
    return on_its_own(on_its_own(mx.minimum(ratio, 1.0)) + on_its_own(norm * 0))
