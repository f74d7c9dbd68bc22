"""An adapter that is to be merged: all kinds of mlx-lm's layout, and its layers by the names of the base's files."""

from collections.abc import Collection
from pathlib import Path

from attrs import evolve

from mlx_trainer.export.low_rank import Adapter, LowRank
from mlx_trainer.export.merging.base import foreign
from mlx_trainer.export.mlx_layout import base_name, read_mlx
from mlx_trainer.export.peft.layout import is_peft
from mlx_trainer.models.adapter_config import CONFIG, TENSORS
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_config, read_json
from mlx_trainer.models.loading import open_tensors, tensor_names

EXPERTS = {"gate_proj": ("gate_proj", "w1"), "down_proj": ("down_proj", "w2"), "up_proj": ("up_proj", "w3")}
"""What the layers of a single expert are called in files, by mlx-lm's name of the stacked ones."""


def read_adapter(directory: Path) -> Adapter:
    """Return the adapter in `directory`, layers of experts and whole weights too, in memory but for the latter.

    Raises ModelError, naming the file.
    """
    if not (directory / TENSORS).is_file():
        peft = f"it is PEFT's: `mlx-trainer export {directory} --to mlx OUTPUT` makes one"
        hint = peft if is_peft(directory) else "give another"
        raise ModelError(f"{directory} holds no adapter in mlx-lm's layout ({TENSORS}); {hint}.")
    config = read_json(directory / CONFIG)
    if isinstance(config, dict) and config.get("fine_tune_type") == "full":
        return Adapter({}, base_name(config), directory=directory, weights=open_tensors(directory / TENSORS))
    return read_mlx(directory, merging=True)


def by_expert(adapter: Adapter, directory: Path) -> Adapter:
    """Return `adapter` with one layer for each expert where mlx-lm stacks them and the files in `directory` do not."""
    if foreign(read_config(directory)):
        return adapter
    names, layers = tensor_names(directory), dict[str, LowRank]()
    for path, layer in adapter.layers.items():
        layers |= experts_of(path, layer, names) or {path: layer}
    return evolve(adapter, layers=layers)


def experts_of(path: str, layer: LowRank, names: Collection[str]) -> dict[str, LowRank]:
    """Return the adapters of the experts stacked at `path` by their own paths; none where `names` lacks one."""
    block, stacked, last = path.rpartition(".switch_mlp.")
    for called in EXPERTS.get(last, ()) if stacked and layer.a.ndim == 3 else ():
        paths = [f"{block}.experts.{number}.{called}" for number in range(len(layer.a))]
        if all(f"{own}.weight" in names for own in paths):
            return {own: LowRank(a.T, b.T, layer.scale) for own, a, b in zip(paths, layer.a, layer.b, strict=True)}
    return {}
