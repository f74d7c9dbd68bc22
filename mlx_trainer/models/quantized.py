"""Packed layers that train fast: with many rows, the weight is dequantized at use, and again for the gradient.

`mx.quantized_matmul` never has the dense weight. That is best for the one row of a generated token; for the thousands
of rows of a training step, dequantizing first and multiplying as usual is several times faster
(`benchmarks/quantized.py`).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer import runtime


class QuantizedLinear(nn.QuantizedLinear):
    """`y = x @ W.T + bias`, x (..., in), y (..., out), W packed and frozen: MLX's layer with a second way to compute.

    Which way depends on the number of rows and the backend alone (`runtime.dequantizing_wins`), so that a run and its
    continuation compute the same bits.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Return `y` for `x`."""
        if not dequantizing_wins(x):
            return super().__call__(x)  # type: ignore[no-any-return, no-untyped-call]
        y = dequantized_matmul(x, self)
        return y + self["bias"] if "bias" in self else y


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """MLX's packed embedding; as the head of a model whose weights are tied, it too has a second way to compute.

    Without affine scales MLX's gives bfloat16, whatever the rest of the model is; this one the `dtype` it was told.
    """

    dtype: mx.Dtype | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """Return the rows of the weight at `x`, (..., dims)."""
        rows: mx.array = super().__call__(x)  # type: ignore[no-untyped-call]
        return rows if self.dtype is None else rows.astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return `x @ W.T`, x (..., dims)."""
        if not dequantizing_wins(x):
            return super().as_linear(x)  # type: ignore[no-any-return, no-untyped-call]
        return dequantized_matmul(x, self)


def dequantize_at_use(model: nn.Module) -> nn.Module:
    """Let the packed layers of `model`, all frozen, compute the faster way, and return it.

    Only their class changes: arrays and their names, what is frozen, mode, and what else refers to the layers stay, so
    that files written before and after, and mlx-lm, which looks for instances of MLX's layers, know no difference.
    """
    faster: dict[type, type] = {nn.QuantizedLinear: QuantizedLinear, nn.QuantizedEmbedding: QuantizedEmbedding}
    for module in model.modules():
        if type(module) in faster:  # a subclass may compute something else
            module.__class__ = faster[type(module)]
    return model


def embed_as(model: nn.Module, dtype: mx.Dtype) -> None:
    """Let the packed embeddings of `model` that have no affine scales give `dtype`: their values are exact in each."""
    for module in model.modules():
        if type(module) in (nn.QuantizedEmbedding, QuantizedEmbedding) and module.mode != "affine":
            module.__class__, module.dtype = QuantizedEmbedding, dtype


def dequantizing_wins(x: mx.array) -> bool:
    """Whether `dequantized_matmul` is faster for `x` (..., in) than MLX's `quantized_matmul`."""
    return runtime.dequantizing_wins(x.size // x.shape[-1])


def dequantized_matmul(x: mx.array, layer: Any) -> mx.array:
    """`x @ W.T` for the packed weight W of `layer`; the gradient, with respect to x alone, dequantizes W anew.

    Equal to `mx.quantized_matmul` but for rounding: W is rounded to the type of the result.
    """
    kind = result_type(x, layer)

    @mx.custom_function
    def matmul(x: mx.array) -> mx.array:
        return x.astype(kind) @ dequantized(layer, kind, x).T

    @matmul.vjp
    def matmul_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        return (cotangent @ dequantized(layer, kind, cotangent)).astype(x.dtype)

    product: mx.array = matmul(x)  # type: ignore[assignment]  # its stub says that it returns an object
    return product


def dequantized(layer: Any, kind: mx.Dtype, after: mx.array) -> mx.array:
    """The weight, (out, in), of a packed `layer` as `kind`, not computed before `after` is.

    Without that dependency MLX would keep the dense weight of every layer from the forward pass to the backward pass:
    `mx.compile` merges equal computations, and without it, what depends on packed weights alone is computed early.
    """
    weight: Any = mx.depends(layer.weight, after)
    return dequantize(weight, layer.scales, layer.get("biases"), kind, layer.group_size, layer.bits, layer.mode)


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array | None, kind: mx.Dtype, group_size: int, bits: int, mode: str
) -> mx.array:
    """What a packed `weight` stands for, computed in `kind`; MLX alone would compute it in the type of the scales."""
    if biases is not None:  # only then are the scales floating-point numbers
        scales, biases = scales.astype(kind), biases.astype(kind)
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=kind)


def result_type(x: mx.array, layer: Any) -> mx.Dtype:
    """The type of `mx.quantized_matmul`'s result: that of `x`, but for affine scales of a wider one."""
    return x.dtype if layer.mode != "affine" else mx.result_type(x, layer.scales, layer.biases)
