"""What a block computes again in the backward pass, so that less has to be kept from the forward pass.

Bytes a position and layer on a 7B shape in 16 bits (hidden 4096, 8 of 32 heads for keys, MLP 14336), adapters on all
linear layers, with their dropout; without adapters the inputs of linear layers are not kept. Each policy keeps less
than the one before it; the last column is what it runs twice, of 436 million multiplications a position and layer.

| policy | kept | KB | run twice |
|---|---|---|---|
| `none` | all that the gradient needs, the inputs of adapters and their dropout too | 220 | nothing |
| `attention` | the same without the scores of rows, and the output of attention | | scores and their sums |
| `selective` | h twice, queries, keys, values, attention, gate and up | 93 | norms, dropout, SwiGLU, adapters' first half |
| `mlp` | h twice, queries, keys, values, attention | 36 | also gate and up: 117 million, 27 % of a forward pass |
| `block` | h | 8 | everything but the last product: a third of a step with a frozen base |

`attention` helps where MLX keeps or makes the scores, rows · heads · length² of them (`attention.py`); its fused kernels
keep none, so it is only there that `selective` runs attention again too.
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
    trained = [tree_flatten(module.trainable_parameters()) for module in modules]
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
        # Without this dependency it could run long before its turn, and a compiled step would keep the first run.
        inputs = mx.depends(primals[: len(primals) - len(parameters)], cotangents)
        _, gradients = mx.vjp(of_all, [*inputs, *primals[len(inputs) :]], cotangents)
        return tuple(gradients)

    return lambda *arrays: once_more(*arrays, *parameters)


def run_once(function: Function, *modules: Any) -> Function:
    """`function` itself."""
    return function


def as_list(arrays: Any) -> list[mx.array]:
    """One array, or several, as a list."""
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)
