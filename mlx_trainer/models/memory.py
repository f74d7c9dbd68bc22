"""What a training step of the unpadded Llama path needs at its peak, told from shapes alone before it runs.

    peak = weights + optimizer state + max(kept for gradients + in flight, what the update makes anew)

Weights and state are exact, and what is kept is counted, array by array, for a compiled step (`BlockBytes.kept`). What
is in flight, results of operations that are queued or have just run, is fitted to measured peaks (`InFlight`).
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Self

import mlx.core as mx
from attrs import frozen
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from mlx_trainer import runtime
from mlx_trainer.models.attention import block_size, fused
from mlx_trainer.models.head import head_of, part_size
from mlx_trainer.models.lora import DoRALinear, LoRALinear, base_of, dimensions, dropout_of, factors
from mlx_trainer.models.recomputation import POLICIES, Policy

MARGIN = 0.1
"""The share of memory that `auto` leaves free: the estimate's error, and what other programs take."""


@frozen
class InFlight:
    """So many times a block's arrays, its scores, and its adapters' results are in flight."""

    arrays: float
    scores: float
    adapters: float = 0.0


# MLX queues about a hundred operations on a CPU, one or two blocks' worth. Fitted to the peaks of compiled steps there:
# float32, hidden 64 to 192, 6 to 16 layers, 256 to 1,024 positions.
IN_FLIGHT: Mapping[Policy, InFlight] = {
    "none": InFlight(2.5, 1.0),
    "attention": InFlight(2.0, 1.8),
    "selective": InFlight(1.8, 1.5),
    "mlp": InFlight(2.0, 1.5),
    "block": InFlight(2.4, 2.9, 0.5),
}
LOGITS_IN_FLIGHT = 4.0
"""The same for the head: so many times a part's logits in float32."""
QUEUE: Mapping[runtime.Backend, float] = {"cpu": 0.94, "cuda": 1.1, "metal": 2.1}
"""How much of `IN_FLIGHT` there is. CPU: less since norms and rotations take few operations. CUDA: from six peaks of a
7B shape on an H200 with `none`, five of them then within 1 %, that of a 4-bit base 4 % above. Metal: a guess."""
HALVES: Mapping[Policy, tuple[float, float]] = {
    "none": (0.4, 1.0),
    "attention": (0.4, 1.0),
    "selective": (0.4, 1.0),
    "mlp": (1.0, 0.0),
    "block": (1.0, 0.0),
}
"""How much there is of a block's and of the logits, where halves of a batch are computed side by side.

The peak is at the heads, where each half has less than half of a block in flight, or where blocks run again. From 48
peaks on a CPU, 20 sizes of 128 to 512 hidden, each within 9 %; a later one of two layers is 10 % below.
"""


@frozen
class MemoryEstimate:
    """The peak of a step in bytes, and its parts: what trains is counted in `weights`.

    `update` is what the update makes anew, parameters and state; each gradient is given back as it is used, or with
    those that it is joined with.
    """

    policy: Policy
    weights: int
    state: int
    kept: int
    in_flight: int
    update: int

    @property
    def peak(self) -> int:
        """The most bytes that are held at once."""
        return self.weights + self.state + max(self.kept + self.in_flight, self.update)

    def line(self, limit: int) -> str:
        """The estimate beside a `limit` in bytes, for people."""
        peak, *parts = (f"{n / 1e9:.3g}" for n in (self.peak, self.weights, self.state, self.kept, self.in_flight))
        names = ("weights", "optimizer", "kept for gradients", "in flight")
        told = ", ".join(f"{name} {part}" for name, part in zip(names, parts, strict=True))
        return f"Memory: about {peak} GB of {limit / 1e9:.3g} GB ({told}); recompute: {self.policy}."


def choose(model: Any, batch: Any, optimizer: Optimizer, limit: int) -> MemoryEstimate:
    """The first policy, in the order of their cost, that leaves `MARGIN` of `limit` bytes free; else the leanest.

    A function of shapes and the limit alone, so that a continued run chooses what it chose before. `attention` is left
    out where its kernel is fused: `selective` costs less there and saves more.
    """
    estimates = [estimate(model, batch, optimizer, policy) for policy in POLICIES]
    if fused(activations(model)):
        estimates = [one for one in estimates if one.policy != "attention"]
    fitting = (one for one in estimates if one.peak <= (1 - MARGIN) * limit)
    return next(fitting, min(estimates, key=lambda one: one.peak))


def estimate(model: Any, batch: Any, optimizer: Optimizer, policy: Policy) -> MemoryEstimate:
    """What a step of `model` needs with `policy`, for an unpadded batch of this shape; nothing is computed.

    `optimizer` is given a new state. A sum of several micro-batches' gradients is not counted: for adapters it is next
    to nothing. Nor is DPO's reference, of which nothing is kept for gradients: it has its turn of what is in flight.
    Half of a batch, which the other is computed beside, is estimated as both are, with less in flight (`HALVES`).
    """
    *earlier, last = model.model.layers
    sizes = Sizes.of(batch)
    blocks = [BlockBytes.of(layer, sizes, sizes.positions, activations(model)) for layer in earlier]
    blocks.append(BlockBytes.of(last, sizes, sizes.predictions, activations(model)))
    trained = model.trainable_parameters()
    optimizer.init(trained)
    state = size(optimizer.state)
    head_kept, logits = head_bytes(model, sizes.predictions)
    of_blocks, of_logits = HALVES[policy] if batch.whole else (1.0, 1.0)
    queued = of_blocks * max(block.in_flight(policy) for block in blocks) + of_logits * LOGITS_IN_FLIGHT * logits
    return MemoryEstimate(
        policy=policy,
        weights=size(model.parameters()),
        state=state,
        kept=sum(block.kept(policy) for block in blocks[frozen_blocks(model) :]) + head_kept,
        in_flight=int(QUEUE[runtime.backend()] * queued),
        update=size(trained) + state,
    )


@frozen
class Sizes:
    """The sizes of an unpadded batch, `rows` of `length` in its grid, or of the one that it is half of."""

    positions: int
    predictions: int
    rows: int
    length: int
    prefix: int
    groups: int

    @classmethod
    def of(cls, batch: Any) -> Self:
        """Those of `batch`."""
        rows, length = batch.grid.shape
        positions, predictions, rows = batch.whole or (batch.input_ids.size, batch.targets.size, rows)
        return cls(positions, predictions, rows, length, batch.prefix, batch.groups)


@frozen
class BlockBytes:
    """The arrays of one block in bytes: its results, and what the gradients of its linear layers need of their inputs.

    `hidden` is that of one array (positions, hidden), `scores` those that attention keeps, `attended` its result,
    `adapted` what adapters add, `dense` the weights of packed layers.
    """

    hidden: int
    queries_keys_values: int
    scores: int
    attended: int
    gate_up: int
    output_inputs: int
    other_inputs: int
    adapted: int
    dense: int

    @classmethod
    def of(cls, layer: Any, batch: Sizes, fed: int, dtype: mx.Dtype) -> "BlockBytes":
        """Those of `layer`: attention computes the cells of all rows, the MLP `fed` positions, the rest all of them."""
        attention, mlp = layer.self_attn, layer.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        outputs, feeding = (attention.o_proj,), (mlp.gate_proj, mlp.up_proj)
        rows, positions, shared = batch.rows, batch.positions, batch.groups * batch.prefix
        cells, seen_cells = rows * batch.length + shared, rows * (batch.prefix + batch.length) + shared
        linears = [*inputs, *outputs, *feeding, mlp.down_proj]
        adapters = [linear for linear in linears if isinstance(linear, LoRALinear)]
        hidden, width = widths(attention.q_proj)
        one = positions * dtype.size
        return cls(
            hidden=one * hidden,
            queries_keys_values=dtype.size * (cells * width + seen_cells * sum(widths(one)[1] for one in inputs[1:])),
            scores=0 if fused(dtype) else attention.n_heads * dtype.size * scored_cells(batch),
            attended=cells * width * dtype.size,
            gate_up=fed * dtype.size * sum(widths(linear)[1] for linear in feeding),
            output_inputs=positions * input_bytes(dtype, *outputs, made=False),
            other_inputs=positions * input_bytes(dtype, *inputs)
            + fed * sum(input_bytes(dtype, *alike) for alike in (feeding, (mlp.down_proj,))),
            adapted=one * sum(widths(linear)[1] for linear in adapters),
            dense=dtype.size * sum(math.prod(widths(linear)) for linear in linears if hasattr(base_of(linear), "bits")),
        )

    def kept(self, policy: Policy) -> int:
        """What is kept from the forward to the backward pass."""
        scored = self.scores + self.attended + self.output_inputs
        lean = 2 * self.hidden + self.queries_keys_values
        result = 0 if self.scores else self.attended  # else attention runs again
        return {
            "none": lean + scored + self.gate_up + self.other_inputs,
            "attention": lean + self.gate_up + self.other_inputs,
            "selective": lean + result + self.gate_up,
            "mlp": lean + result,
            "block": self.hidden,
        }[policy]

    def in_flight(self, policy: Policy) -> float:
        """What is computed for this block and its neighbours and not yet given back, on a CPU."""
        times, arrays = IN_FLIGHT[policy], 4 * self.hidden + self.queries_keys_values + self.gate_up
        computed = times.arrays * arrays + times.scores * self.scores + times.adapters * self.adapted
        return computed + self.dense


def frozen_blocks(model: Any) -> int:
    """How many blocks stand before the first that has a gradient."""
    if tree_flatten(model.model.embed_tokens.trainable_parameters()):
        return 0
    trains = [bool(tree_flatten(layer.trainable_parameters())) for layer in model.model.layers]
    return [*trains, True].index(True)


def scored_cells(batch: Sizes) -> int:
    """Pairs of tokens, one query and one key, that attention scores, for a head."""
    own = batch.rows * seen_by_blocks(batch.length, batch.prefix)
    return own + batch.groups * seen_by_blocks(batch.prefix, 0)


def seen_by_blocks(length: int, before: int) -> int:
    """The same for a row with so many tokens `before` it; on Linux CPUs blocks of queries see no later keys."""
    if not runtime.linux_cpu() or length == 0:
        return length * (before + length)
    size = block_size(length)
    ends = [min(end, length) for end in range(size, length + size, size)]
    return sum((end - begin) * (before + end) for begin, end in pairwise([0, *ends]))


def input_bytes(dtype: mx.Dtype, *layers: Any, made: bool = True) -> int:
    """Bytes a position of what the gradients of `layers` need of their input, and of what their adapters made of it.

    That is an adapter's first product, and the output that a magnitude scales. An input that is `made` again
    (`project`) is not kept for an adapter, but for a weight that trains.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    needed = (bool(adapted) and not made) or any("weight" in layer.trainable_parameters() for layer in layers)
    own = sum(factors(layer)[0].shape[1] for layer in adapted)
    own += sum(widths(layer)[1] for layer in adapted if isinstance(layer, DoRALinear))
    masks = sum(dropout_of(layer) > 0 for layer in adapted) * mx.bool_.size
    return widths(layers[0])[0] * (needed * dtype.size + masks) + own * dtype.size


def head_bytes(model: Any, predictions: int) -> tuple[int, int]:
    """What the loss keeps, and the logits of one part in float32; with a head that trains, all logits are kept."""
    _, module = head_of(model)
    vocabulary, hidden = base_of(model.model.embed_tokens).weight.shape[0], model.model.norm.weight.size
    dtype = activations(model)
    logits = min(predictions, part_size(vocabulary)) * vocabulary * mx.float32.size
    if tree_flatten(module.trainable_parameters()):
        return predictions * vocabulary * (mx.float32.size + dtype.size), logits
    return 2 * predictions * hidden * dtype.size, logits


def activations(model: Any) -> mx.Dtype:
    """The type that hidden states are in."""
    kind: mx.Dtype = model.model.norm.weight.dtype
    return kind


def widths(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, adapted or not."""
    linear: Any = base_of(layer)
    return dimensions(linear)


def size(tree: Any) -> int:
    """Bytes of all arrays in a tree."""
    leaves: Any = tree_flatten(tree)
    return sum(value.nbytes for _, value in leaves)
