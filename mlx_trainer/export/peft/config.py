"""PEFT's adapter_config.json: what of it can be carried, what is refused by name, and which layers it targets."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from mlx_trainer.config.patterns import by_pattern, check_patterns
from mlx_trainer.export.low_rank import block_of, number
from mlx_trainer.models.adapter_config import CONFIG
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_json

PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "megatron_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "ensure_weight_tying": False,
}
"""Options that change what is computed, and the one value of each that plain LoRA has."""

ON_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take the adapter's start out of the base weights, which are then others than published."""

PATTERNS = ("rank_pattern", "alpha_pattern")
SHAPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(PATTERNS, (lambda value: isinstance(value, dict), "names with numbers")),
    **dict.fromkeys(("use_rslora", "use_dora"), (lambda value: isinstance(value, bool), "true or false")),
    "lora_dropout": (lambda value: (share := number(value)) is not None and 0 <= share < 1, "a number from 0 to 1"),
    "layers_to_transform": (lambda value: isinstance(value, int | list), "a block's number, or a list of them"),
}
"""What other options have to be."""

MOST = 1 << 20
"""No layer has so many inputs, so no rank is larger."""


@frozen
class PeftConfig:
    """What is read of PEFT's configuration; rank and alpha of a layer may be its own."""

    path: Path
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The value of an option, None where it is not written."""
        return self.values.get(name)

    def rank(self, layer: str) -> int:
        """The rank of `layer` (transformers' name); raises ModelError where it is no whole number."""
        rank = by_pattern(self["rank_pattern"] or {}, layer, self["r"])
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST:
            raise ModelError(
                f"{self.path} has rank {rank!r:.50} for {layer}; it must be a whole number from 1 to {MOST:,}."
            )
        return rank

    def scale(self, layer: str) -> float:
        """alpha / rank, with use_rslora alpha / √rank (https://arxiv.org/abs/2312.03732)."""
        written = by_pattern(self["alpha_pattern"] or {}, layer, self["lora_alpha"])
        if not (alpha := number(written)):
            raise ModelError(
                f"{self.path} has lora_alpha {written!r:.50} for {layer}; it must be a number that is not 0."
            )
        return alpha / (math.sqrt(self.rank(layer)) if self["use_rslora"] else self.rank(layer))


def read_config(directory: Path) -> PeftConfig:
    """Return the configuration in `directory`; raises ModelError, by name, for what cannot be carried."""
    path = directory / CONFIG
    values = read_json(path)
    if not isinstance(values, dict) or "peft_type" not in values:
        raise ModelError(f'{path} is not the configuration of a PEFT adapter: it has no "peft_type".')
    if values["peft_type"] != "LORA":
        raise ModelError(f"{path} has peft_type {values['peft_type']!r:.50}; only LORA can be carried.")
    for name, plain in PLAIN.items():
        if (value := values.get(name)) and value != plain:
            raise ModelError(
                f"{path} has {name} {value!r:.100}, which mlx-lm has nothing for; merge the adapter in PEFT."
            )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(ON_THE_BASE):
        raise ModelError(
            f"{path} has init_lora_weights {start!r:.50}: the adapter belongs to a changed base. Save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it one for the base as published."
        )
    for name, (good, wanted) in SHAPES.items():
        if (value := values.get(name)) is not None and not good(value):
            raise ModelError(f"{path} has {name} {value!r:.100}; it must be {wanted}.")
    for name in PATTERNS:
        try:
            check_patterns(values.get(name) or {})
        except ValueError as error:
            raise ModelError(f"{path} has in {name} {error}.") from error
    return PeftConfig(path, values)


def check_targeted(config: PeftConfig, layers: Collection[str]) -> None:
    """Raise ModelError for a layer that has tensors but is none of the configuration's targets: PEFT would drop it.

    A target that is one regular expression is not tried: it may take for ever.
    """
    targets, chosen = config["target_modules"], config["layers_to_transform"]
    if not isinstance(targets, list):
        return
    numbers = None if chosen is None or chosen == [] else [chosen] if isinstance(chosen, int) else chosen
    if missed := [layer for layer in layers if not targeted(layer, targets, numbers)]:
        raise ModelError(
            f"{config.path.parent} has tensors of {missed[0]}, which its target_modules and layers_to_transform do not "
            f"name ({len(missed)} such layers)."
        )


def targeted(layer: str, targets: Sequence[Any], numbers: Sequence[Any] | None = None) -> bool:
    """Whether PEFT adapts `layer`: whole names always, last names only in the blocks of these `numbers`.

    >>> targeted("model.layers.3.self_attn.q_proj", ["q_proj"], [3]), targeted("lm_head", ["lm_head"], [3])
    (True, True)
    """
    if layer in targets:
        return True
    named = any(layer.endswith(f".{target}") for target in targets)
    return named and (numbers is None or block_of(layer)[1] in numbers)


def describe(layers: Collection[str], known: Collection[str] | None) -> dict[str, Any]:
    """Return the options that make PEFT adapt exactly `layers`, the shortest that do.

    `known` are the names of all layers of the base. Without them each block that is seen may have all layers that are
    seen, and there may be more blocks, so those adapted are always listed.
    """
    universe = set(layers) | set(alike(layers) if known is None else known)
    for options in candidates(layers, listed=known is None):
        numbers = options["layers_to_transform"]
        if {layer for layer in universe if targeted(layer, options["target_modules"], numbers)} == set(layers):
            return options
    raise AssertionError("whole names always fit")


def alike(layers: Collection[str]) -> Iterator[str]:
    """Yield the names of `layers` in each block that one of them is in."""
    numbers = {number for _, number in map(block_of, layers) if number is not None}
    for layer in layers:
        name, own = block_of(layer)
        yield from (layer.replace(f"{name}.{own}.", f"{name}.{number}.", 1) for number in numbers)


def candidates(layers: Collection[str], *, listed: bool) -> Iterator[dict[str, Any]]:
    """Yield descriptions of `layers`: last names, last names in some blocks, names within a block, whole names."""
    blocks = {layer: block_of(layer) for layer in layers}
    lists = sorted({name for name, _ in blocks.values() if name is not None})
    numbers = sorted({number for _, number in blocks.values() if number is not None})
    inside = [layer for layer in layers if blocks[layer][0] is not None]
    whole = sorted(set(layers) - set(inside))
    last = sorted({layer.rpartition(".")[2] for layer in inside})
    within = sorted({re.sub(r"^.*?\.\d+\.", "", layer) for layer in inside})
    chosen = {"layers_to_transform": numbers or None, "layers_pattern": (lists or None) if numbers else None}
    everywhere: dict[str, Any] = {"layers_to_transform": None, "layers_pattern": None}
    for names in (last, within):
        if not listed:
            yield {"target_modules": names + whole, **everywhere}
        yield {"target_modules": names + whole, **chosen}
    yield {"target_modules": sorted(layers), **everywhere}
