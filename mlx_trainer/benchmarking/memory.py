"""What the memory of a training is made of."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from mlx_trainer.monitoring import read_memory
from mlx_trainer.traced import leaves

GB = 1e9


@frozen
class Memory:
    """In GB of 1e9 bytes: what arrays hold now and held at most, what MLX keeps to use again, and the peak's parts.

    `weights_gb` are the model's (in full fine-tuning they train), `training_gb` the adapters and the optimizer's
    state, `step_gb` the rest of the peak: activations, gradients, logits, and temporaries of queued work. `used_gb` is
    what this process takes, on a CPU all of it.
    """

    active_gb: float
    cache_gb: float
    peak_gb: float
    used_gb: float
    weights_gb: float
    training_gb: float
    step_gb: float


def memory_of(model: nn.Module, optimizer_state: Any, *, adapters: bool) -> Memory:
    """Read the counters, and split the peak."""
    now = read_memory()
    trained = size_gb(model.trainable_parameters()) if adapters else 0.0
    weights, training = size_gb(model.parameters()) - trained, trained + size_gb(optimizer_state)
    step = max(now.peak_gb - weights - training, 0.0)
    return Memory(now.active_gb, now.cache_gb, now.peak_gb, now.used_gb, weights, training, step)


def size_gb(tree: Any) -> float:
    """Return what the arrays of a tree weigh."""
    return sum(leaf.nbytes for leaf in leaves(tree) if isinstance(leaf, mx.array)) / GB
