"""PEFT's forward pass, written out over a model of mlx-lm: what an exported adapter is checked with.

It takes the tensors as they stand on disk, so that a factor not transposed or a scale lost on the way is seen.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.export.low_rank import Adapter
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora.layers import Linear, dense_weight, dimensions
from mlx_trainer.models.lora.targets import EMBEDDINGS


class PeftLayer(nn.Module):
    """`base(x) + scaling · B A x`; with DoRA `m / ‖W + scaling · B A‖` times that, but for the bias.

    A is (rank, in), B (out, rank), m (out,), as in https://arxiv.org/abs/2106.09685 and 2402.09353.
    """

    def __init__(self, base: Any, a: mx.array, b: mx.array, scaling: float, m: mx.array | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.base, self.a, self.b, self.scaling, self.m = base, a, b, scaling, m

    def __call__(self, x: mx.array) -> mx.array:
        """Return the layer's output for ids or activations `x`."""
        y: mx.array = self.base(x)
        low = self.a.T[x] if isinstance(self.base, EMBEDDINGS) else x @ self.a.T
        delta = self.scaling * (low @ self.b.T)
        if self.m is None:
            return y + delta.astype(y.dtype)
        bias = self.base.get("bias", mx.array(0.0, y.dtype))
        norm = mx.linalg.norm(dense_weight(self.base) + self.scaling * (self.b @ self.a), axis=1)
        result: mx.array = bias + ((self.m / norm) * (y - bias + delta)).astype(y.dtype)
        return result

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits of a head that is the embedding itself: PEFT leaves it as it was."""
        y: mx.array = self.base.as_linear(x)
        return y


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Return the layers of `model` that PEFT can adapt, by their path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, (Linear, *EMBEDDINGS))}


def check_fits(adapter: Adapter, layers: Mapping[str, Any], base: str) -> None:
    """Raise ModelError for a layer of `adapter` that is none of the base's `layers`, or of another size."""
    for path, found in adapter.layers.items():
        if path not in layers:
            raise ModelError(
                f"The adapter has {path}, which is no linear layer or embedding of {base}; is it the base?"
            )
        layer = layers[path]
        inputs, outputs = dimensions(layer)
        wanted = (outputs, inputs) if isinstance(layer, EMBEDDINGS) else (inputs, outputs)
        sizes = found.a.shape[0], found.b.shape[1]
        if sizes != wanted:
            raise ModelError(
                f"The adapter goes from {sizes[0]} to {sizes[1]} in {path}, {base} from {wanted[0]} to {wanted[1]}."
            )
