"""An adapter as what it computes, whatever its layout on disk.

Each layer has `y = W x + scale · (x a) b`; DoRA (https://arxiv.org/abs/2402.09353) has `m / ‖W + scale · (a b)ᵀ‖` times
that, the norm being one of each output; a bias stays outside.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
from attrs import evolve, frozen

from mlx_trainer.models.adapters import check_finite
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.monitoring import visible

LEAVES = ("lora_a", "lora_b", "m")
Value = TypeVar("Value")


@frozen
class LowRank:
    """One layer's adapter: `a` (in, rank), `b` (rank, out), DoRA's magnitudes `m` (out,) or None; all float32.

    Of an embedding `a` is (vocabulary, rank).
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return int(self.a.shape[1])


@frozen
class Adapter:
    """The adapted layers by their path in mlx-lm's model, and what both layouts say about them."""

    layers: Mapping[str, LowRank]
    base: str | None
    dropout: float = 0.0
    use_rslora: bool = False

    @property
    def use_dora(self) -> bool:
        """Whether the layers have magnitudes; all of them have, or none."""
        return any(layer.m is not None for layer in self.layers.values())


def tensors_of(path: Path) -> dict[str, mx.array]:
    """Return the tensors of `path` in float32 and in memory; raises ModelError for any but finite floats."""
    if not path.is_file():
        raise ModelError(f"{path.parent} holds no adapter: {path.name} is missing.")
    tensors = open_tensors(path)
    if wrong := [name for name, value in tensors.items() if not mx.issubdtype(value.dtype, mx.floating)]:
        raise ModelError(f"{path} has {visible(wrong[0]):.200} as {tensors[wrong[0]].dtype}, which is no float.")
    check_finite(tensors, path)
    whole = {name: value.astype(mx.float32) for name, value in tensors.items()}
    mx.eval(whole)  # mx.load is lazy: read now, before the file may change
    return whole


def low_rank(name: str, parts: Mapping[str, mx.array], scale: float, *, dora: bool, path: Path) -> LowRank:
    """Return the adapter of layer `name` from its `parts` in `path`; raises ModelError where one lacks or misfits."""
    layer = f"{path}: {visible(name):.200}"
    wanted = LEAVES if dora else LEAVES[:2]
    if set(parts) != set(wanted):
        raise ModelError(f"{layer} has {', '.join(sorted(parts))}; needed are {', '.join(wanted)}.")
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    if a.ndim == 3:
        raise ModelError(f"{layer} is a layer of experts, which cannot be carried; merge it instead.")
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] > 0 and (m is None or m.shape == (b.shape[1],))
    if not fits:
        shapes = ", ".join(f"{leaf} {tuple(value.shape)}" for leaf, value in parts.items())
        raise ModelError(f"{layer} has {shapes}, which do not fit each other.")
    return LowRank(a, b, scale, m)


def trimmed(layer: LowRank) -> LowRank:
    """Return `layer` without the zeros at its end that several ranks are padded with; one rank at least stays."""
    used = (layer.a != 0).any(axis=0) | (layer.b != 0).any(axis=1)
    rank = max(int(mx.max(used * mx.arange(1, layer.rank + 1))), 1)
    return evolve(layer, a=layer.a[:, :rank], b=layer.b[:rank])


def evened(layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Return `layers` with one rank, the largest, and one scale, the most frequent: the same function.

    Smaller ranks are padded with zeros, and the ratio of the scales goes into `b`.
    """
    rank, scale = max(layer.rank for layer in layers.values()), most(layer.scale for layer in layers.values())

    def even(layer: LowRank) -> LowRank:
        a = mx.pad(layer.a, [(0, 0), (0, rank - layer.rank)])
        b = mx.pad(layer.b * (layer.scale / scale), [(0, rank - layer.rank), (0, 0)])
        return LowRank(a, b, scale, layer.m)

    return {path: even(layer) for path, layer in layers.items()}


def alpha_of(layer: LowRank, *, rslora: bool) -> float:
    """Return alpha = scale · rank, with rsLoRA (https://arxiv.org/abs/2312.03732) scale · √rank; whole where it was."""
    alpha = layer.scale * (math.sqrt(layer.rank) if rslora else layer.rank)
    return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def number(value: object) -> float | None:
    """Return a finite number of a file as a float, None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and abs(value) < 1e300 else None  # type: ignore[arg-type]


def most(values: Iterable[Value]) -> Value:
    """Return the most frequent of `values`, the first of several."""
    return Counter(values).most_common(1)[0][0]


def block_of(path: str) -> tuple[str | None, int | None]:
    """Return what the list of blocks is called that a layer is in, and which of them it is; None outside of them.

    >>> block_of("model.layers.3.self_attn.q_proj"), block_of("lm_head")
    (('layers', 3), (None, None))
    """
    found = re.match(r"(?:.*?\.)?(\w+)\.(\d+)\.", path)
    return (found[1], int(found[2])) if found else (None, None)
