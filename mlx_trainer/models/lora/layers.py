"""The layers that LoRA makes: a frozen layer with a low-rank adapter beside it, and what can be asked of one."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_trainer.models.quantized import dequantize

Linear = nn.Linear | nn.QuantizedLinear
ADAPTER_NAMES = ("lora_a", "lora_b")
MAGNITUDE = "m"
"""What a DoRA layer trains besides."""


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
        self.lora_a = uniform((inputs, rank), inputs, key)
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        """Return `y` for `x`."""
        a, b = factors(self)
        y = self.linear(x)
        low = self.dropout(x) @ a.astype(x.dtype)
        return y + self.scale * (low @ b.astype(x.dtype))

    def start_at(self, a: mx.array, b: mx.array) -> None:
        """Let the adapter start at `a` (in, rank) and `b` (rank, out), and the layer at what `linear` computes.

        What the adapter starts at is taken off again: `y = linear(x) + scale * dropout(x) @ (lora_a @ lora_b - a @ b)`.
        """
        self.lora_a, self.lora_b = a, b
        # Arrays of their own, which an update in place does not reach; the underscore keeps them out of the parameters.
        self._start_a, self._start_b = mx.array(a), mx.array(b)


class DoRALinear(LoRALinear):
    """`y = m · (W x + scale · …) / ‖W + scale · (lora_a lora_b)ᵀ‖ + bias`, the norm and `m` (out,) one for each output.

    https://arxiv.org/abs/2402.09353; as in its section 4.3, in mlx-lm and in PEFT the norm is a constant in the
    gradient. It starts at the base layer's output: `m` is the norm of the rows of W.
    """

    def __init__(self, linear: Linear, **options: Any) -> None:
        super().__init__(linear, **options)
        self._squares = mx.square(dense_weight(linear)).sum(axis=1)
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        """Return `y` for `x`."""
        return self.rescaled(super().__call__(x))

    def rescaled(self, y: mx.array) -> mx.array:
        """Return the layer's output for `y` (..., out), that of the same layer without magnitudes."""
        ratio = (self.m / mx.stop_gradient(self.norm())).astype(y.dtype)
        return self.linear.bias + ratio * (y - self.linear.bias) if "bias" in self.linear else ratio * y

    def norm(self) -> mx.array:
        """Return the float32 norms of the rows of the adapted weight, (out,).

        `‖w‖² + 2 s · w (ab) + s² ‖ab‖²` row by row: no array as large as the weight is made.
        """
        a, b = factors(self)
        bias = self.linear.bias if "bias" in self.linear else 0
        product = (self.linear(a.T.astype(float_type(self.linear))) - bias).astype(mx.float32)  # (W a)ᵀ
        added = 2 * (product * b).sum(axis=0) + self.scale * (((a.T @ a) @ b) * b).sum(axis=0)
        return mx.sqrt(self._squares + self.scale * added)


def factors(layer: Any) -> tuple[mx.array, mx.array]:
    """Return the two matrices whose product `layer` adds, scaled: what trains, and beside it what it started at.

    Of a start that is taken off (`LoRALinear.start_at`) they are [lora_a, a] and [lora_b, -b], of twice the rank.
    """
    if "lora_e" in layer:
        return layer.lora_a, layer.lora_e * layer.lora_b
    if "_start_a" not in layer:
        return layer.lora_a, layer.lora_b
    return mx.concatenate([layer.lora_a, layer._start_a], axis=1), mx.concatenate([layer.lora_b, -layer._start_b])


def base_of(layer: Any) -> Any:
    """The frozen layer below an adapter, else the layer itself."""
    if not is_adapter(layer):
        return layer
    return layer.linear if "linear" in layer else layer.embedding


def is_adapter(layer: Any) -> bool:
    """Whether `layer` is one with a low-rank adapter: ours, or mlx-lm's on an embedding or on experts."""
    return "lora_a" in layer and "lora_b" in layer


def rank_of(layer: Any) -> int:
    """The rank of what an adapted layer trains."""
    rank: int = layer.lora_a.shape[1]
    return rank


def dropout_of(layer: Any) -> float:
    """The chance that `layer` drops an element of x now: 0 in eval mode and without an adapter."""
    dropout = layer.dropout if is_adapter(layer) else None
    return 1 - dropout._p_1 if dropout is not None and dropout.training else 0.0


def dimensions(layer: Any) -> tuple[int, int]:
    """Return (in, out) of a layer, (dims, rows) of an embedding; a packed weight holds 32 / bits values a number."""
    outputs, inputs = layer.weight.shape[-2:]
    return (inputs * 32 // layer.bits if "scales" in layer else inputs), outputs


def dense_weight(layer: Any) -> mx.array:
    """The weight of `layer` as float32, (out, in); a packed one as MLX rounds it, to the type of its scales."""
    weight: mx.array = layer.weight
    if "scales" in layer:
        biases = layer.get("biases")
        kind = mx.float32 if biases is None else layer.scales.dtype
        weight = dequantize(weight, layer.scales, biases, kind, layer.group_size, layer.bits, layer.mode)
    return weight.astype(mx.float32)


def float_type(layer: Any) -> mx.Dtype:
    """The type that `layer` computes in without widening its weight."""
    kinds = [layer[name].dtype for name in ("weight", "scales", "bias") if name in layer]
    return next((kind for kind in kinds if mx.issubdtype(kind, mx.floating)), mx.float32)


def is_switch(layer: nn.Module) -> bool:
    """Whether `layer` is mlx-lm's linear layer of several experts, whose weight is (experts, out, in)."""
    if not isinstance(layer.get("weight"), mx.array) or layer.weight.ndim != 3:
        return False
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(layer, (SwitchLinear, QuantizedSwitchLinear))


def uniform(shape: tuple[int, ...], fan_in: int, key: mx.array) -> mx.array:
    """mlx-lm's start of `lora_a`: uniform within ±1/√fan_in."""
    bound = fan_in**-0.5
    return mx.random.uniform(low=-bound, high=bound, shape=shape, key=key)


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters of `model` by their dotted name."""
    return dict(tree_flatten(model.trainable_parameters()))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers of `model` by their dotted path, sorted."""
    return {
        path: module for path, module in sorted(model.named_modules(), key=lambda item: item[0]) if is_adapter(module)
    }
