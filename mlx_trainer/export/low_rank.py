"""An adapter as what it computes, and what it makes of its base's weights, whatever its layout on disk.

Each layer has `y = W x + scale · (x a) b`; DoRA (https://arxiv.org/abs/2402.09353) has `m / ‖W + scale · (a b)ᵀ‖` times
that, the norm being one of each output; a bias stays outside.
"""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import mlx.core as mx
from attrs import evolve, field, frozen

from mlx_trainer.models.adapters import check_finite
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.models.lora.layout import most
from mlx_trainer.monitoring import visible

LEAVES = ("lora_a", "lora_b", "m")


@frozen
class LowRank:
    """One layer's adapter: `a` (in, rank), `b` (rank, out), DoRA's magnitudes `m` (out,) or None; all float32.

    Of an embedding `a` is (vocabulary, rank); of a layer of experts they are (experts, rank, in), (experts, out, rank).
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None

    @property
    def rank(self) -> int:
        """The inner dimension of the product."""
        return int(self.a.shape[1])

    def delta(self, shape: Collection[int]) -> mx.array:
        """ΔW in float32 for a weight of that shape; raises ValueError where it has another."""
        a, b = self.a, self.b
        if a.ndim == 3 and (a.shape[0], b.shape[1], a.shape[2]) == tuple(shape):
            return self.scale * (b @ a)
        outer = (a.shape[0], b.shape[-1])
        if a.ndim == 2 and outer[::-1] == tuple(shape):  # also of a square embedding, which no model has
            return self.scale * (a @ b).T
        if a.ndim == 2 and outer == tuple(shape):
            return self.scale * (a @ b)
        raise ValueError(f"factors {a.shape} and {b.shape} do not fit a weight of {tuple(shape)}")

    def merged(self, weight: mx.array) -> mx.array:
        """`W + ΔW`, or with magnitudes `m (W + ΔW) / ‖W + ΔW‖` row by row; raises ValueError as `delta` does."""
        adapted = weight.astype(mx.float32) + self.delta(weight.shape)
        if self.m is None:
            return adapted
        if self.m.shape != adapted.shape[:1]:
            raise ValueError(f"magnitudes {self.m.shape} do not fit a weight of {adapted.shape}")
        return adapted * (self.m / row_norms(adapted))[:, None]

    def unmerged(self, merged: mx.array, weight: mx.array) -> mx.array:
        """W again, from what `merged` made of it; the norms that DoRA divided by are those of the base's `weight`."""
        return self.gain(weight) * merged.astype(mx.float32) - self.delta(weight.shape)

    def gain(self, weight: mx.array) -> mx.array:
        """What each row of a merged weight is multiplied by on the way back, (out, 1): 1 but for DoRA."""
        if self.m is None:
            return mx.ones((1, 1))
        return (row_norms(weight.astype(mx.float32) + self.delta(weight.shape)) / self.m)[:, None]


@frozen
class Adapter:
    """The adapted layers by their path in mlx-lm's model, what the layouts say about them, and where it was read.

    After full fine-tuning it has `weights` instead, which take the place of the base's by their names.
    """

    layers: Mapping[str, LowRank]
    base: str | None
    dropout: float = 0.0
    use_rslora: bool = False
    directory: Path | None = None
    weights: Mapping[str, mx.array] = field(factory=dict)

    @property
    def use_dora(self) -> bool:
        """Whether the layers have magnitudes; all of them have, or none."""
        return any(layer.m is not None for layer in self.layers.values())

    @property
    def targets(self) -> list[str]:
        """The names of all weights that it changes, sorted."""
        return sorted([*self.weights, *(f"{path}.weight" for path in self.layers)])


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


def low_rank(
    name: str, parts: Mapping[str, mx.array], scale: float, *, dora: bool, path: Path, merging: bool = False
) -> LowRank:
    """Return the adapter of layer `name` from its `parts` in `path`; raises ModelError where one lacks or misfits.

    For merging it may be one of experts, stacked, or of an embedding, whose magnitudes are those of its rows.
    """
    layer = f"{path}: {visible(name):.200}"
    wanted = LEAVES if dora else LEAVES[:2]
    if set(parts) != set(wanted):
        raise ModelError(f"{layer} has {', '.join(sorted(parts))}; needed are {', '.join(wanted)}.")
    a, b, m = parts["lora_a"], parts["lora_b"], parts.get("m")
    if a.ndim == 3 and not merging:
        raise ModelError(f"{layer} is a layer of experts, which cannot be carried; merge it instead.")
    stacked = a.ndim == b.ndim == 3 and a.shape[:2] == (b.shape[0], b.shape[2])
    fits = stacked or (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] > 0)
    if not fits or (m is not None and m.shape not in ((b.shape[1],), a.shape[:1] if merging else None)):
        shapes = ", ".join(f"{leaf} {tuple(value.shape)}" for leaf, value in parts.items())
        raise ModelError(f"{layer} has {shapes}, which do not fit each other.")
    return LowRank(a, b, scale, m)


def trimmed(layer: LowRank) -> LowRank:
    """Return `layer` without the zeros at its end that several ranks are padded with; one rank at least stays."""
    if layer.a.ndim == 3:
        return layer
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


def row_norms(weight: mx.array) -> mx.array:
    """The Euclidean norm of each row of (out, in); 0 counts as 1, so that a row of zeros stays one."""
    norms = mx.linalg.norm(weight, axis=1)
    return mx.where(norms == 0, mx.ones_like(norms), norms)


def block_of(path: str) -> tuple[str | None, int | None]:
    """Return what the list of blocks is called that a layer is in, and which of them it is; None outside of them.

    >>> block_of("model.layers.3.self_attn.q_proj"), block_of("lm_head")
    (('layers', 3), (None, None))
    """
    found = re.match(r"(?:.*?\.)?(\w+)\.(\d+)\.", path)
    return (found[1], int(found[2])) if found else (None, None)
