"""All adapters of a model with one rank and one scale, which is all that mlx-lm's file can say, and back again.

An adapter of a smaller rank is filled up with zeros, one of another scale has the ratio of the scales in its `lora_b`,
and one whose start is taken off has that start beside it: the same function each time.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from attrs import frozen

from mlx_trainer.models.lora.layers import MAGNITUDE, factors, rank_of

Value = TypeVar("Value")
Tensors = Mapping[str, mx.array]
"""Those of one layer by their last name, or those of a model by their dotted one."""


@frozen
class Layout:
    """The rank of a file's tensors, and the scale that is applied to all of their products."""

    rank: int
    scale: float

    @classmethod
    def of(cls, layers: Mapping[str, Any]) -> "Layout":
        """The one for `layers`, not empty: their largest rank and their most frequent scale."""
        rank = max(factors(layer)[0].shape[1] for layer in layers.values())
        return cls(rank, most(layer.scale for layer in layers.values()))

    def ratio(self, layer: Any) -> float:
        """What the `lora_b` of `layer` is multiplied by, as float32 has it."""
        return float(np.float32(layer.scale / self.scale))


def most(values: Iterable[Value]) -> Value:
    """Return the most frequent of `values`, the first of several."""
    return Counter(values).most_common(1)[0][0]


def tensors_of(layer: Any) -> dict[str, mx.array]:
    """Return what an adapted layer adds to its base, a start that is taken off included."""
    a, b = factors(layer)
    return {"lora_a": a, "lora_b": b} | ({MAGNITUDE: layer.m} if MAGNITUDE in layer else {})


def packed(layer: Any, layout: Layout) -> dict[str, mx.array]:
    """Return the tensors of `layer` as a file with `layout` has them."""
    own = tensors_of(layer)
    for name in ("lora_a", "lora_b") if own["lora_a"].shape[1] < layout.rank else ():
        own[name] = filled_up(own[name], rank_axis(name, own[name]), layout.rank)
    if (ratio := layout.ratio(layer)) != 1:
        own["lora_b"] = own["lora_b"] * ratio
    return own


def unpacked(layer: Any, found: Tensors, layout: Layout, exact: mx.array | None) -> dict[str, mx.array]:
    """Return the tensors of `layer` out of those `found` for it in a file with `layout`.

    `exact`, a `lora_b` of `inexact`, is taken where it is the one that was packed. What does not fit stays as it is.
    """
    wanted, ratio = tensors_of(layer), layout.ratio(layer)
    own = {name: cut(name, value, wanted[name], layout) if name in wanted else value for name, value in found.items()}
    if ratio != 1 and "lora_b" in own:
        same = exact is not None and mx.array_equal(exact * ratio, own["lora_b"]).item()
        own["lora_b"] = exact if same and exact is not None else own["lora_b"] / ratio
    return own


def inexact(layers: Mapping[str, Any], layout: Layout) -> dict[str, mx.array]:
    """Return, by their dotted name, each `lora_b` that a division by the ratio might not give back bit for bit."""
    inexact = [path for path, layer in layers.items() if math.frexp(layout.ratio(layer))[0] != 0.5]
    return {f"{path}.lora_b": tensors_of(layers[path])["lora_b"] for path in inexact}


def put_back(layer: Any, own: Tensors) -> None:
    """Let `layer` have its `own` tensors, which fit it, the start that is taken off included."""
    rank = rank_of(layer)
    layer.update({name: part(name, value, slice(rank)) for name, value in own.items()})
    if "_start_a" in layer:
        layer._start_a = part("lora_a", own["lora_a"], slice(rank, None))
        layer._start_b = -part("lora_b", own["lora_b"], slice(rank, None))


def part(name: str, value: mx.array, ranks: slice) -> mx.array:
    """Those `ranks` of a tensor, as an array of its own: products with a part of another one are rounded otherwise."""
    if name == MAGNITUDE:
        return value
    index = [slice(None)] * value.ndim
    index[rank_axis(name, value)] = ranks
    return mx.contiguous(value[tuple(index)])


def rank_axis(name: str, value: mx.array) -> int:
    """Which axis is the rank: `lora_a` is (in, rank) or (experts, rank, in), `lora_b` its counterpart."""
    return 1 if name == "lora_a" else 0 if value.ndim == 2 else 2


def filled_up(value: mx.array, axis: int, rank: int) -> mx.array:
    """`value` with zeros behind, up to `rank` along `axis`."""
    missing = [(0, rank - value.shape[axis] if i == axis else 0) for i in range(value.ndim)]
    return mx.pad(value, missing)


def cut(name: str, value: mx.array, like: mx.array, layout: Layout) -> mx.array:
    """`value` without the zeros that `filled_up` put behind; as it is where it is not of the layout's rank, or no 0."""
    if name == MAGNITUDE or value.ndim != like.ndim:
        return value
    axis, rank = rank_axis(name, value), like.shape[rank_axis(name, like)]
    if not value.shape[axis] == layout.rank > rank or mx.any(part(name, value, slice(rank, None))).item():
        return value
    return part(name, value, slice(rank))
