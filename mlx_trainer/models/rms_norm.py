"""RMSNorm (https://arxiv.org/abs/1910.07467) on Linux CPUs, with one root for each position.

Of MLX's own there, a root for each element comes of what is fused, and the gradient adds the squares up again. With
r = 1 / √(mean x² + ε) and weight w

    y = x r w,   g = dy w,   dx = r g - x r³ mean(g x),   dw = Σ dy x r
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer import runtime
from mlx_trainer.fusion import on_its_own


def normed(norm: Any, x: mx.array) -> mx.array:
    """Return `norm(x)` for x (positions, width), whatever `norm` is."""
    if type(norm) is nn.RMSNorm and x.dtype == norm.weight.dtype == mx.float32 and runtime.linux_cpu():
        return rms_norm(x, norm.weight, norm.eps)
    return norm(x)  # type: ignore[no-any-return]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return `mx.fast.rms_norm(x, weight, eps)`, x (positions, width) in float32."""

    @mx.custom_function
    def forward(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        root = on_its_own(mx.rsqrt(mx.square(x).mean(axis=-1, keepdims=True) + eps))
        return x * root * weight, root

    @forward.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        (x, weight), (dy, _), (_, root) = primals, cotangents, outputs
        g = dy * weight
        along = on_its_own((g * x).mean(axis=-1, keepdims=True) * root * root * root)
        return root * g - x * along, (dy * x * root).sum(axis=0)

    return forward(x, weight)[0]  # type: ignore[index,no-any-return]  # its stub says that it returns an object
