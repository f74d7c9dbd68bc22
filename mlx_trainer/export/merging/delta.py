"""What an adapter in mlx-lm's layout changes in its base model: low-rank updates of layers, or whole weights."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from attrs import evolve, frozen

from mlx_trainer.models.adapter_config import CONFIG, TENSORS
from mlx_trainer.models.adapters import check_finite
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.monitoring import visible

FACTORS = ("lora_a", "lora_b", "m")


@frozen
class Update:
    """The low-rank update ΔW of one layer's weight W, and DoRA's magnitudes `m` (out,) where it has them.

    `a` and `b` are (in, rank) and (rank, out) of a linear layer, (rows, rank) and (rank, width) of an embedding,
    (experts, rank, in) and (experts, out, rank) of a layer of experts.
    """

    a: mx.array
    b: mx.array
    scale: float
    m: mx.array | None = None

    def delta(self, shape: Collection[int]) -> mx.array:
        """ΔW in float32 for a weight of that shape; raises ValueError where it has another."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        if a.ndim == 3 and (a.shape[0], b.shape[1], a.shape[2]) == tuple(shape):
            return self.scale * (b @ a)
        outer = (a.shape[0], b.shape[-1])
        if a.ndim == 2 and outer[::-1] == tuple(shape):  # also of a square embedding, which no model has
            return self.scale * (a @ b).T
        if a.ndim == 2 and outer == tuple(shape):
            return self.scale * (a @ b)
        raise ValueError(f"factors {a.shape} and {b.shape} do not fit a weight of {tuple(shape)}")

    def merged(self, weight: mx.array) -> mx.array:
        """`W + ΔW`, or with magnitudes `m (W + ΔW) / ‖W + ΔW‖` row by row (https://arxiv.org/abs/2402.09353)."""
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
    """An adapter that was read: `updates` by the layers' paths, `weights` that replace others by their names."""

    directory: Path
    base: str | None
    num_layers: int
    updates: Mapping[str, Update]
    weights: Mapping[str, mx.array]

    @property
    def targets(self) -> list[str]:
        """The names of all weights that it changes, sorted."""
        return sorted([*self.weights, *(f"{path}.weight" for path in self.updates)])


def read_adapter(directory: Path) -> Adapter:
    """Return the adapter in `directory`, in memory but for whole weights; raises ModelError."""
    if not (directory / TENSORS).is_file():
        peft = (directory / "adapter_model.safetensors").is_file()
        hint = f"it is PEFT's: `mlx-trainer export {directory} --to mlx OUTPUT` makes one" if peft else "give another"
        raise ModelError(f"{directory} holds no adapter in mlx-lm's layout ({TENSORS}); {hint}.")
    config, tensors = read_json(directory / CONFIG), open_tensors(directory / TENSORS)
    try:
        full = config.get("fine_tune_type") == "full"
        scale = 1.0 if full else float(config["lora_parameters"]["scale"])
        adapter = Adapter(directory, config.get("model"), int(config["num_layers"]), {}, {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{directory / CONFIG} is no configuration of an mlx-lm adapter: {error!r:.200}.") from error
    if full:
        return evolve(adapter, weights=tensors)
    check_finite(tensors, directory / TENSORS)
    return evolve(adapter, updates=updates(tensors, scale, directory))


def updates(tensors: Mapping[str, mx.array], scale: float, directory: Path) -> dict[str, Update]:
    """Return the tensors of an adapter layer by layer; raises ModelError for one that lacks its other factor."""
    layers: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        path, _, factor = name.rpartition(".")
        if factor not in FACTORS:
            raise ModelError(
                f"{directory / TENSORS}: {visible(name)} is none of {', '.join(FACTORS)}; it belongs to no adapter."
            )
        layers.setdefault(path, {})[factor] = value
    for path, factors in layers.items():
        if not {"lora_a", "lora_b"} <= factors.keys():
            raise ModelError(
                f"{directory / TENSORS} has of {visible(path)} only {', '.join(sorted(factors))}; it is damaged."
            )
    return {
        path: Update(factors["lora_a"], factors["lora_b"], scale, factors.get("m")) for path, factors in layers.items()
    }


def row_norms(weight: mx.array) -> mx.array:
    """The Euclidean norm of each row of (out, in); 0 counts as 1, so that a row of zeros stays one."""
    norms = mx.linalg.norm(weight, axis=1)
    return mx.where(norms == 0, mx.ones_like(norms), norms)
