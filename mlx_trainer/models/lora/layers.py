"""The layers that LoRA makes: a frozen layer with a low-rank adapter beside it, and what can be asked of one."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Linear = nn.Linear | nn.QuantizedLinear
ADAPTER_NAMES = ("lora_a", "lora_b")


class LoRALinear(nn.Module):
    """`y = linear(x) + scale * (dropout(x) @ lora_a) @ lora_b`, x (..., in), y (..., out), in the type of x.

    The same names, start and function as mlx-lm's layer (https://arxiv.org/abs/2106.09685). The float32 adapters are
    cast at use; mlx-lm's layer turns all of a 16-bit x into float32 instead.
    """

    def __init__(self, linear: Linear, *, rank: int, scale: float, dropout: float, key: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        inputs, outputs = dimensions(linear)
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        bound = inputs**-0.5
        self.lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, rank), key=key)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """Return `y` for `x`."""
        y = self.linear(x)
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return y + self.scale * (low @ self.lora_b.astype(x.dtype))


def base_of(layer: Any) -> nn.Module:
    """The layer below an adapter of exactly our class, else the layer itself."""
    return layer.linear if type(layer) is LoRALinear else layer


def dropout_of(layer: Any) -> float:
    """The chance that `layer` drops an element of x now: 0 in eval mode and without an adapter."""
    dropout = layer.dropout if type(layer) is LoRALinear else None
    return 1 - dropout._p_1 if dropout is not None and dropout.training else 0.0


def dimensions(linear: Linear) -> tuple[int, int]:
    """Return (in, out) of a linear layer; a packed weight holds 32 / bits values in each number."""
    outputs, inputs = linear.weight.shape
    return (inputs * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else inputs), outputs


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters of `model` by their dotted name."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of `model` by their dotted path, sorted."""
    return {
        path: module
        for path, module in sorted(model.named_modules(), key=lambda item: item[0])
        if isinstance(module, LoRALinear)
    }
