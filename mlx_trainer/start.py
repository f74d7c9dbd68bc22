"""Where a training begins: at an adapter that there is already, mlx-lm's or PEFT's, in the place of a new one."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import asdict
from mlx.utils import tree_unflatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.export.mlx_layout import base_name
from mlx_trainer.export.peft import in_mlx_layout
from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.models.adapter_config import CONFIG, TENSORS, adapted_paths, lora_of
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.lora import DoRALinear, adapted_layers, rank_of, trainable
from mlx_trainer.preference import DPOModule

log = logging.getLogger("mlx_trainer.start")


def settings_of(adapter: Path) -> dict[str, object]:
    """Return the settings of a training like that of the `adapter` in a folder: its base model and its `lora`."""
    with in_mlx_layout(adapter) as folder:
        lora, base = lora_of(folder), base_name(read_json(folder / CONFIG))
    settings: dict[str, object] = {} if base is None else {"model.model_name": base}
    for name, value in (asdict(lora) if lora is not None else {}).items():
        settings[f"lora.{name}"] = list(value) if isinstance(value, tuple) else value
    return settings


def begin_at(adapter: Path, module: CausalLMModule) -> None:
    """Give `module` the weights in the folder `adapter`, which for DPO are the reference too; loads the model.

    Raises ModelError, naming the option to set, where the adapters are not like those that `module` trains.
    """
    with in_mlx_layout(adapter) as folder:
        lora = lora_of(folder)
        if lora is None:
            raise ModelError(
                f"{adapter} holds weights trained in full and no adapter to train on; merge them (mlx-trainer merge), "
                "and name what comes out as model.model_name."
            )
        tell_base(adapter, base_name(read_json(folder / CONFIG)), module.name)
        check_alike(adapter, lora, adapted_paths(folder / TENSORS), adapted_layers(module.model))
        module.load(folder)
    if isinstance(module, DPOModule):
        module.keep_reference()
    log.info("Training begins at the adapter in %s, with a new optimizer.", adapter)


def refer_to(adapter: Path, module: CausalLMModule) -> None:
    """Let the `adapter` that a DPO training began at be the reference of `module`, whose own weights stay."""
    if isinstance(module, DPOModule):
        own = trainable(module.model)
        begin_at(adapter, module)
        module.model.update(tree_unflatten(list(own.items())))


def tell_base(adapter: Path, trained_on: str | None, name: str) -> None:
    """Warn where an adapter says that it was trained on another model than the one at `name`."""
    if trained_on is not None and os.path.realpath(trained_on) != os.path.realpath(name):
        log.warning("%s was trained on %s, and training goes on with %s.", adapter, trained_on, name)


def check_alike(adapter: Path, lora: LoRAConfig, paths: list[str], layers: dict[str, Any]) -> None:
    """Raise ModelError where the adapters in a folder, of `lora` on `paths`, are others than those of `layers`."""
    if other := sorted(set(paths) ^ layers.keys()):
        has, lacks = (str(adapter), "this training") if other[0] in paths else ("this training", str(adapter))
        raise ModelError(
            f"{has} has an adapter on {other[0]} and {lacks} has none ({len(other)} such layers); set "
            f"lora.target_modules and lora.layers_to_transform to the layers of {adapter / CONFIG}."
        )
    for path, layer in layers.items():
        for option, theirs, ours in differences(lora, path, layer):
            raise ModelError(f"{adapter} has {option} {theirs} on {path} and this training {ours}; set it so.")


def differences(lora: LoRAConfig, path: str, layer: Any) -> Iterator[tuple[str, object, object]]:
    """Yield each option by which the adapter of `lora` at `path` is not like `layer`, its own value, and that here."""
    dora, begun = isinstance(layer, DoRALinear), "_start_a" in layer
    if lora.use_dora != dora:
        yield "lora.use_dora", str(lora.use_dora).lower(), str(dora).lower()
    if (lora.init_lora_weights != "default") != begun:
        yield "lora.init_lora_weights", lora.init_lora_weights, "pissa or olora" if begun else "default"
    if lora.rank_of(path) != rank_of(layer):
        yield "lora.rank", lora.rank_of(path), rank_of(layer)
    if not math.isclose(lora.scale_of(path), layer.scale, rel_tol=1e-6):
        yield "a scale (lora.alpha / lora.rank) of", lora.scale_of(path), layer.scale
