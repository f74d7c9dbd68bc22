"""AdaLoRA's layer: the update as three factors, of which the middle one says what each rank is worth."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.models.lora.layers import LoRALinear

DEVIATION = 0.02
"""Of the normal distribution that the outer factors start from, as in PEFT."""


class AdaLoRALinear(LoRALinear):
    """`y = linear(x) + scale * (dropout(x) @ lora_a) @ (lora_e * lora_b)`, x (..., in), y (..., out).

    `lora_e` (r, 1) starts at 0, and so y at `linear(x)`.
    """

    def __init__(self, plain: LoRALinear, key: mx.array) -> None:
        """Take the place of `plain`, whose rank is the first one."""
        nn.Module.__init__(self)
        self.linear, self.dropout, self.scale = plain.linear, plain.dropout, plain.scale
        first, second = mx.random.split(key)
        self.lora_a = DEVIATION * mx.random.normal(plain.lora_a.shape, key=first)
        self.lora_b = DEVIATION * mx.random.normal(plain.lora_b.shape, key=second)
        self.lora_e = mx.zeros((plain.lora_a.shape[1], 1))

    def folded(self) -> LoRALinear:
        """Return an ordinary LoRA layer that computes the same, of the ranks that are left, or of one that adds 0."""
        left = [i for i, (value,) in enumerate(self.lora_e.tolist()) if value != 0] or [0]  # type: ignore[misc, arg-type]
        chosen = mx.array(left)
        plain = LoRALinear(self.linear, rank=len(left), scale=self.scale, dropout=0.0, key=mx.random.key(0))
        plain.dropout = self.dropout
        plain.lora_a, plain.lora_b = self.lora_a[:, chosen], (self.lora_e * self.lora_b)[chosen]
        return plain


def orthogonality(layers: Sequence[Any]) -> mx.array:
    """The mean over the outer factors M of `layers` of `‖MᵀM - I‖`, Frobenius: how far from orthogonal; a scalar."""
    squares = [gram for layer in layers for gram in (layer.lora_a.T @ layer.lora_a, layer.lora_b @ layer.lora_b.T)]
    return mx.stack([mx.linalg.norm(square - mx.eye(len(square))) for square in squares]).mean()


def mean_rank(layers: Sequence[Any]) -> mx.array:
    """How many entries of `lora_e` are not 0, for each of the `layers` on average; a float32 scalar."""
    return mx.stack([(layer.lora_e != 0).sum() for layer in layers]).astype(mx.float32).mean()
