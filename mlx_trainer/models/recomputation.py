"""What a block computes again in the backward pass, so that less has to be kept from the forward pass.

KB a position and layer on a 7B shape in 16 bits (hidden 4096, 8 of 32 heads for keys, MLP 14336), adapters with dropout
on all linear layers. A step with a frozen base multiplies 436 million times for each, half of that forward.

| policy | kept | KB | run again |
|---|---|---|---|
| `none` | what the gradient needs, dropout's random bits too | 142 | norms and SwiGLU, where adapters need them |
| `attention` | of attention no scores, result or adapter's input | 121 | attention |
| `selective` | h twice, queries, keys, values, their result, gate, up | 94 | norms, dropout, SwiGLU, half of adapters |
| `mlp` | h twice, queries, keys, values, their result | 37 | also gate and up: 117 million, 27 % of a step |
| `block` | h | 8 | all but the last product: 159 million, 37 % of a step |

So `selective` runs no product with a weight again, and keeps what such products give. Where attention is not fused, its
scores are kept by `none` too, rows · heads · length² of them a layer, and `selective` and `mlp` run attention again as
well: on CPUs and Metal, and on CUDA in float32 (`attention.py`).
"""

from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

Policy = Literal["none", "attention", "selective", "mlp", "block"]
POLICIES: tuple[Policy, ...] = ("none", "attention", "selective", "mlp", "block")
"""From the one that keeps most to the one that keeps least."""

Function = Callable[..., Any]


def run_again(function: Function, *modules: Any) -> Function:
    """`function` of arrays, of which only the arguments are kept: its gradient computes it once more.

    What trains in it must belong to `modules`: anything else that it captures is constant, as for `mx.checkpoint`. It
    must not draw from the global random state, which would be another one then. It runs again when the gradient of its
    result is there, not before; what the gradient does not need of it, such as its last product, is never run again.
    """
    trained: list[Any] = [tree_flatten(module.trainable_parameters()) for module in modules]
    names = [[name for name, _ in own] for own in trained]
    parameters = [value for own in trained for _, value in own]

    def of_all(*arrays: mx.array) -> Any:
        inputs, values = arrays[: len(arrays) - len(parameters)], iter(arrays[len(arrays) - len(parameters) :])
        for module, own in zip(modules, names, strict=True):
            module.update(tree_unflatten([(name, next(values)) for name in own]))
        try:
            return function(*inputs)
        finally:  # the arrays of an inner trace must not stay in the modules
            for module, own in zip(modules, trained, strict=True):
                module.update(tree_unflatten(own))

    once_more = mx.custom_function(of_all)

    @once_more.vjp
    def gradient(primals: Any, cotangents: Any, outputs: Any) -> Any:
        primals, cotangents = as_list(primals), as_list(cotangents)
        count = len(primals) - len(parameters)
        # Without this dependency it could run long before its turn, and a compiled step would keep the first run.
        inputs = mx.depends(primals[:count], cotangents)
        _, gradients = mx.vjp(of_all, [*inputs, *primals[count:]], cotangents)
        to_inputs, to_parameters = gradients[:count], gradients[count:]
        if to_parameters:  # else these may be left for later, when all are clipped, and keep what they need until then
            to_inputs = mx.depends(to_inputs, to_parameters)
        return (*to_inputs, *to_parameters)

    return lambda *arrays: once_more(*arrays, *parameters)


def run_once(function: Function, *modules: Any) -> Function:
    """`function` itself."""
    return function


def as_list(arrays: Any) -> list[mx.array]:
    """One array, or several, as a list."""
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)
