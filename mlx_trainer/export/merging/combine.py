"""Several adapters of one base as one: their updates added, subtracted and scaled (https://arxiv.org/abs/2212.04089).

With `T_i = w_i ΔW_i` the update of each adapter times its weight, layer by layer:

    cat     Σ T_i, exact: the factors stand beside each other, ranks add
    linear  Σ T_i, exact, with the smallest rank that holds it
    svd     the nearest of rank `rank` to Σ T_i
    ties    the largest of each T_i, of these the ones with the sign that most of the sum has, averaged; then svd
    dare    each value of T_i kept with chance `density` and divided by it, added; then svd
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from attrs import frozen

from mlx_trainer.export.low_rank import Adapter, LowRank
from mlx_trainer.export.merging.adapter import read_adapter
from mlx_trainer.export.merging.sums import Factors, Fit, Matrix, cat, dare, linear, svd, ties
from mlx_trainer.export.mlx_layout import write_mlx
from mlx_trainer.export.output import complete_folder
from mlx_trainer.models.error import ModelError

METHODS = ("cat", "linear", "svd", "ties", "dare")
DENSITY = 0.5
Way = Callable[[Sequence[Factors]], Fit]


@frozen
class Combined:
    """A combined adapter: its folder, rank, layers, and how far it is from what its method means before the rank.

    `error` is ‖difference‖ / ‖update‖ over all layers.
    """

    directory: Path
    rank: int
    layers: int
    error: float

    def __str__(self) -> str:
        """The result in one line."""
        what = "exact" if self.error < 1e-6 else f"{100 * self.error:.3g} % off what a full rank would hold"
        return f"{self.directory}: an adapter of rank {self.rank} on {self.layers} layers, {what}."


def combine(
    adapters: Sequence[Path],
    output: Path,
    weights: Sequence[float] | None = None,
    method: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> Combined:
    """Write to the new folder `output` an adapter in mlx-lm's layout that is the weighted sum of `adapters`.

    `weights` are 1 each by default; a negative one subtracts. `rank` is that of the result, for svd, ties and dare (by
    default the highest among the adapters); `density` is the share of values that ties and dare keep (0.5), `seed`
    (0) says which ones dare does. A layer that an adapter does not have counts as 0. Raises ModelError for adapters
    of different bases or shapes, for DoRA, whose magnitudes are no sum, for whole weights, and layers of experts.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    check(adapters, weights, method, rank, density, seed)
    read = [read_adapter(path) for path in adapters]
    check_alike(read)
    rank = rank or max(layer.rank for adapter in read for layer in adapter.layers.values())
    way = way_of(method, rank, DENSITY if density is None else density, seed or 0)
    with complete_folder(output) as folder:
        layers = fits(read, weights, way)
        base = next((adapter.base for adapter in read if adapter.base), None)
        write_mlx(Adapter({path: layer_of(fit) for path, fit in layers.items()}, base), folder)
    reached = max(fit.a.shape[1] for fit in layers.values())
    lost, size = (math.hypot(*parts) for parts in zip(*((fit.lost, fit.size) for fit in layers.values()), strict=True))
    return Combined(output, reached, len(layers), lost / size if size else 0.0)


def check(
    adapters: Sequence[Path],
    weights: Sequence[float],
    method: str,
    rank: int | None,
    density: float | None,
    seed: int | None,
) -> None:
    """Raise ModelError where an option is out of its range, or does nothing with this method."""
    if not adapters or len(weights) != len(adapters):
        raise ModelError(f"There are {len(adapters)} adapters and {len(weights)} weights; give one for each adapter.")
    if not all(np.isfinite(weights)):
        raise ModelError(f"The weights {list(weights)} must be finite numbers.")
    if method not in METHODS:
        raise ModelError(f"method {method!r} is unknown; it is one of {', '.join(METHODS)}.")
    if rank is not None and (method in ("cat", "linear") or rank < 1):
        raise ModelError(f"rank {rank}: svd, ties and dare take one, at least 1; cat and linear are exact without.")
    if density is not None and (method not in ("ties", "dare") or not 0 < density <= 1):
        raise ModelError(f"density {density:g}: ties and dare take one, above 0 and at most 1.")
    if seed is not None and (method != "dare" or seed < 0):
        raise ModelError(f"seed {seed}: dare takes one, at least 0; the other methods draw nothing.")


def check_alike(adapters: Sequence[Adapter]) -> None:
    """Raise ModelError where the adapters cannot be added."""
    first = adapters[0]
    for adapter in adapters:
        if adapter.base and first.base and not same_base(adapter.base, first.base):
            raise ModelError(f"{adapter.directory} is for {adapter.base}, {first.directory} for {first.base}.")
        if adapter.weights:
            raise ModelError(f"{adapter.directory} is whole weights; only low-rank updates can be combined.")
        for path, layer in adapter.layers.items():
            if layer.m is not None:
                raise ModelError(f"{adapter.directory} has DoRA's magnitudes, which are no sum; merge it instead.")
            if layer.a.ndim != 2:
                raise ModelError(f"{adapter.directory}: {path} is a layer of experts, which cannot be combined.")
    check_shapes(adapters)


def same_base(one: str, other: str) -> bool:
    """Whether two names, or paths of a folder, are of one model."""
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def check_shapes(adapters: Sequence[Adapter]) -> None:
    """Raise ModelError where a layer has one shape in one adapter and another in the next."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for path, layer in adapter.layers.items():
            shape = layer.a.shape[0], layer.b.shape[1]
            if shapes.setdefault(path, shape) != shape:
                raise ModelError(
                    f"{adapter.directory}: {path} is {shape[0]} to {shape[1]}, in another adapter {shapes[path][0]} to "
                    f"{shapes[path][1]}; they are of different bases."
                )


def way_of(method: str, rank: int, density: float, seed: int) -> Way:
    """Return what makes one layer of the result of its weighted factors in each adapter."""
    generator = np.random.default_rng(seed)
    ways: dict[str, Way] = {
        "cat": cat,
        "linear": linear,
        "svd": partial(svd, rank=rank),
        "ties": partial(ties, rank=rank, density=density),
        "dare": partial(dare, rank=rank, density=density, generator=generator),
    }
    return ways[method]


def fits(adapters: Sequence[Adapter], weights: Sequence[float], way: Way) -> dict[str, Fit]:
    """Return every layer of the result by its path, one after the other."""
    found = {}
    for path in sorted({path for adapter in adapters for path in adapter.layers}):
        found[path] = way(
            [
                (numbers(layer.a), weight * layer.scale * numbers(layer.b))
                for adapter, weight in zip(adapters, weights, strict=True)
                if (layer := adapter.layers.get(path)) is not None
            ]
        )
    return found


def numbers(value: mx.array) -> Matrix:
    """Return an array as float64 in NumPy."""
    return np.array(value).astype(np.float64)


def layer_of(fit: Fit) -> LowRank:
    """Return factors as a layer's adapter."""
    return LowRank(mx.array(fit.a.astype(np.float32)), mx.array(fit.b.astype(np.float32)), scale=1.0)
