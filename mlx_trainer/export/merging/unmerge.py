"""Is a merged model what it says? Merged minus adapter must be the base, up to the rounding of its type."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from attrs import frozen

from mlx_trainer.export.low_rank import Adapter, LowRank
from mlx_trainer.export.merging.adapter import by_expert, read_adapter
from mlx_trainer.export.merging.base import Base, open_base
from mlx_trainer.export.merging.merge import base_directory
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_config

ROUNDING = {mx.float16: (2**-11, 2**-25), mx.bfloat16: (2**-8, 2**-134), mx.float32: (0.0, 0.0)}
"""By type, how far rounding moves a number at most: relative to it, and where it is next to 0."""
FLOAT32_STEPS = 8
"""How many units in the last place of float32 the sums of an update may be off."""


@frozen
class Unmerged:
    """How `weights` tensors of a merged model compare: `changed` by the adapter, `wrong` further off than rounding.

    `worst` is the largest distance from the base relative to what rounding allows: at most 1 where nothing is wrong.
    """

    weights: int
    changed: int
    worst: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        """The result in one line."""
        if not self.wrong:
            return (
                f"Merged minus adapter equals the base in all {self.weights} weights ({self.changed} of them changed), "
                f"within rounding: the worst is {self.worst:.2g} of what it allows."
            )
        named = ", ".join(self.wrong[:3])
        return f"Merged minus adapter is not the base in {len(self.wrong)} of {self.weights} weights: {named}."


def check_unmerge(merged: Path, adapter: Path, *, base: str | None = None) -> Unmerged:
    """Return whether each weight of the folder `merged`, less what `adapter` added, is the base's.

    One weight after the other, so that memory holds no model. Raises ModelError where the names differ, where the
    merged model is quantized, or where the adapter is whole weights, from which nothing leads back.
    """
    read = by_expert(read_adapter(adapter), merged)
    if read.weights:
        raise ModelError(f"{adapter} is whole weights, not a low-rank update; merged, nothing leads back to the base.")
    if "quantization" in read_config(merged):
        raise ModelError(f"{merged} is quantized: packing has changed the base's weights too, so it cannot be undone.")
    original, result = open_base(base_directory(read, base), read.targets), open_base(merged, read.targets)
    if differing := sorted(original.weights.keys() ^ result.weights.keys()):
        raise ModelError(f"{merged} and the base do not have the same weights: {', '.join(differing[:5])}.")
    with mx.stream(mx.cpu):
        distances = compared(original, result, read)
    wrong = tuple(name for name, distance in distances.items() if not distance <= 1)  # nor NaN
    return Unmerged(len(distances), len(read.layers), max(distances.values()), wrong)


def compared(original: Base, result: Base, adapter: Adapter) -> Mapping[str, float]:
    """Return by name how far merged minus adapter is from the base, relative to what rounding allows."""
    distances = {}
    for name in sorted(original.weights):
        weight, merged = original.weights.pop(name), result.weights.pop(name)
        if weight.shape != merged.shape:
            raise ModelError(f"{name} has the shape {merged.shape} in the merged model, {weight.shape} in the base.")
        distances[name] = distance(weight, merged, adapter.layers.get(name.removesuffix(".weight")))
    return distances


def distance(weight: mx.array, merged: mx.array, update: LowRank | None) -> float:
    """The largest |merged - ΔW - weight| of one tensor relative to what rounding allows there, 0 where it is exact."""
    unit, smallest = ROUNDING.get(merged.dtype, (0.0, 0.0))
    weight, merged = weight.astype(mx.float32), merged.astype(mx.float32)
    back = merged if update is None else update.unmerged(merged, weight)
    gain = 1.0 if update is None else update.gain(weight)
    apart = mx.abs(back - weight)
    inexact = FLOAT32_STEPS * 2**-24 * (gain * mx.abs(merged) + mx.abs(back) + mx.abs(weight))
    allowed = gain * mx.maximum(unit * mx.abs(merged), smallest) + inexact
    return float(mx.where(apart == 0, 0.0, apart / allowed).max())
