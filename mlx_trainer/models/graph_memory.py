"""What a training step of padded batches needs at its peak, told from the graph that MLX would run, for any model.

    peak = weights + optimizer state + max(most bytes of the graph's arrays at once, what the update makes anew)

The graph of loss and gradients is written down operation by operation, with the sizes of their results, and computed
nowhere. An array is held from the operation that makes it to the last that reads it, and for as long as that waits.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from mlx_trainer.models.lora import trainable
from mlx_trainer.models.loss import next_tokens
from mlx_trainer.models.memory import size
from mlx_trainer.state import preserved_random_state
from mlx_trainer.traced import from_tree, to_tree

QUEUED = 20
"""So many operations wait while others run. Fitted to the peaks of compiled steps on a CPU, in float32: hidden 64 to
256, 6 to 12 layers, 32 to 128 positions, adapters on two or on all layers, or none. On a GPU it is a guess."""
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "Depends", "ExpandDims", "Flatten", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
"""Operations whose results are their inputs' memory."""
ELEMENTWISE = {
    "Abs", "Add", "AsType", "Broadcast", "Ceil", "Cos", "Divide", "Equal", "Erf", "Exp", "Floor", "Greater",
    "GreaterEqual", "Less", "LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr",
    "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Remainder", "Rsqrt", "Select", "Sigmoid",
    "Sign", "Sin", "Sqrt", "Square", "Subtract", "Tanh",
}  # fmt: skip
"""Operations that `mx.compile` joins with the only one that reads their result, so that it never exists."""


@frozen
class Operation:
    """One operation: its kind, the names of what it reads, and by their names the bytes of what it makes."""

    kind: str
    inputs: Sequence[str]
    outputs: Mapping[str, int]


def padded_peak(module: Any, batch: Any, optimizer: Optimizer) -> int | None:
    """Return the bytes that a step of `module` holds at its peak for a padded batch of this shape.

    None where the model has operations that cannot be written down. `optimizer` is given a new state. Costs a trace of
    the model, about 10 ms a layer; the model and MLX's random state are afterwards what they were.
    """
    trained = trainable(module.model)
    optimizer.init(module.model.trainable_parameters())
    state = size(optimizer.state)
    try:
        with preserved_random_state():  # dropout draws from it
            operations, results = graph_of(module, from_tree(to_tree(batch)))
    except (ValueError, RuntimeError):  # custom functions, which a packed layer has
        return None
    finally:
        module.model.update(tree_unflatten(list(trained.items())))  # which tracing has replaced
    return size(module.model.parameters()) + state + max(graph_peak(operations, results), size(trained) + state)


def graph_of(module: Any, batch: Any) -> tuple[list[Operation], list[str]]:
    """Return the operations of loss and gradients in their order, and the names of the results; raises ValueError."""
    targets = mx.maximum(next_tokens(batch.labels), 0)

    def loss(_: nn.Module) -> mx.array:
        return cross_entropy(module.forward(batch), targets)

    def step() -> list[mx.array]:
        total, gradients = nn.value_and_grad(module.model, loss)(module.model)
        leaves: Any = tree_flatten(gradients)
        return [total, *(value for _, value in leaves)]

    told: list[dict[str, Any]] = []
    mx.export_function(told.append, step)
    operations = [
        Operation(
            one["name"], [name for name, *_ in one["inputs"]], {name: nbytes(*of) for name, *of in one["outputs"]}
        )
        for one in told
        if one["type"] == "primitive"
    ]
    return operations, [name for one in told if one["type"] == "outputs" for name, *_ in one["outputs"]]


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the summed loss in operations that can be written down, and that hold what `loss.py` does."""
    scores = logits.astype(mx.float32)
    largest = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
    sums = mx.log(mx.exp(scores - largest).sum(axis=-1)) + scores.max(axis=-1)
    return (sums - mx.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]).sum()


def nbytes(shape: Sequence[int], dtype: mx.Dtype) -> int:
    """The size of an array."""
    return math.prod(shape) * dtype.size


def graph_peak(operations: Sequence[Operation], results: Sequence[str]) -> int:
    """Return the most bytes that the arrays of a graph take at once; what it is given is not counted.

    >>> product, power = Operation("Matmul", ["x"], {"y": 8}), Operation("Exp", ["y"], {"z": 8})
    >>> graph_peak([product, power, Operation("Sum", ["z"], {"s": 4})], ["s"])
    20
    """
    fused = joined(operations, results)
    memory: dict[str, frozenset[str]] = {}  # of each array: the arrays whose memory it stands in, or is computed from
    sizes, born, last, now = dict[str, int](), dict[str, int](), dict[str, int](), 0
    for one in operations:
        read = frozenset[str]().union(*(memory.get(name, ()) for name in one.inputs))
        if one.kind in VIEWS or fused & one.outputs.keys():
            memory |= dict.fromkeys(one.outputs, read)
            continue
        now += 1
        memory |= {name: frozenset([name]) for name in one.outputs}
        sizes |= one.outputs
        born |= dict.fromkeys(one.outputs, now)
        last |= dict.fromkeys([*read, *one.outputs], now)
    kept = frozenset[str]().union(*(memory.get(name, ()) for name in results))
    changes = Counter[int]()
    for name, held in sizes.items():
        changes[born[name]] += held
        changes[last[name] + QUEUED + 1] -= 0 if name in kept else held
    return max(accumulate(changes[moment] for moment in sorted(changes)), default=0)


def joined(operations: Sequence[Operation], results: Sequence[str]) -> frozenset[str]:
    """The names of results that never exist, since the one operation that reads each is compiled into one with its."""
    readers: dict[str, list[Operation]] = {}
    for one in operations:
        for name in set(one.inputs):
            readers.setdefault(name, []).append(one)
    names = (name for one in operations if one.kind in ELEMENTWISE - VIEWS for name in one.outputs)
    alone = (name for name in names if len(readers.get(name, ())) == 1 and readers[name][0].kind in ELEMENTWISE)
    return frozenset(alone) - frozenset(results)
