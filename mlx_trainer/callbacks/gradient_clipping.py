"""Bounded gradients."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_trainer.callback import Callback, Gradients
from mlx_trainer.fusion import all_finite, on_its_own
from mlx_trainer.step import StepContext, global_norm


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
        # Without an earlier transform it is the norm that guards look at too, and is computed once.
        norm = context.grad_norm if gradients is context.gradients else global_norm(gradients)
        if self.max_value is not None:
            gradients = clip_by_value(gradients, self.max_value)
        if self.max_norm is not None:
            gradients = clip_by_norm(
                gradients, norm if self.max_value is None else global_norm(gradients), self.max_norm
            )
        return gradients, {"grad_norm": norm}

    def accept_update(self, loss: mx.array, gradients: Gradients, context: StepContext) -> mx.array:
        """Whether the norm before any clipping was finite: scaled by another, the update would be nothing or NaN."""
        return mx.array(True) if self.max_norm is None else all_finite(context.reported["grad_norm"])


def clip_by_value(gradients: Gradients, max_value: float) -> Gradients:
    """Each element clipped to [-max_value, max_value]."""
    return tree_map(lambda g: mx.clip(g, -max_value, max_value).astype(g.dtype), gradients)


def clip_by_norm(gradients: Gradients, norm: mx.array, max_norm: float) -> Gradients:
    """The gradients, whose global norm is `norm`, scaled down to `max_norm`; NaN where `norm` is not finite."""
    ratio = on_its_own(max_norm / on_its_own(norm + 1e-6))
    scale = on_its_own(mx.minimum(ratio, 1.0)) + on_its_own(norm * 0)
    # Multiplied in float32: a small scale would be 0 in float16.
    return tree_map(lambda g: (g.astype(mx.float32) * scale).astype(g.dtype), gradients)
