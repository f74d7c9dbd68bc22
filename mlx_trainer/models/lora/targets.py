"""Which layers of a model get an adapter: by the names, patterns and blocks of a `LoRAConfig`."""

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mlx_trainer.config import LoRAConfig
from mlx_trainer.config.patterns import matches
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora.layers import Linear, dimensions, is_switch

log = logging.getLogger("mlx_trainer.models")

ALL_LINEAR = "all-linear"
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the linear layers of `model` by their dotted path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.QuantizedLinear))
    }


def adaptable_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that can have an adapter by their dotted path: linear ones, those of experts, embeddings."""
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, (nn.Linear, nn.QuantizedLinear, *EMBEDDINGS)) or is_switch(module))
        and not hasattr(module, "to_lora")  # mlx-lm's name for a layer that is several in one
    }


def chosen_layers(model: nn.Module, lora: LoRAConfig) -> dict[str, Any]:
    """Return the layers of `model` that `lora` adapts by their dotted path, sorted.

    Raises ModelError where a name, a pattern or a block's number says nothing about this model.
    """
    layers = adaptable_layers(model)
    if lora.layers_to_transform is not None:
        within = [blocks(model)[number] for number in checked_numbers(model, lora.layers_to_transform)]
        layers = {path: layer for path, layer in layers.items() if path.startswith(tuple(within))}
    targets = all_linear(model, layers) if lora.target_modules == ALL_LINEAR else lora.target_modules
    paths = target_paths(list(layers), targets)
    check_patterns(paths, lora)
    chosen = {path: layers[path] for path in paths}
    check_ranks(chosen, lora)
    check_bits(chosen, lora)
    return chosen


def blocks(model: Any) -> list[str]:
    """Return the dotted prefix, its dot included, of each of the model's blocks."""
    prefixes = {id(module): f"{path}." for path, module in model.named_modules()}
    return [prefixes[id(block)] for block in model.layers]


def checked_numbers(model: Any, numbers: Sequence[int]) -> Sequence[int]:
    """Return `numbers`, or raise ModelError for one beyond the model's blocks."""
    if beyond := [number for number in numbers if number >= len(model.layers)]:
        raise ModelError(
            f"lora.layers_to_transform has {beyond[0]}; this model's blocks are 0 to {len(model.layers) - 1}."
        )
    return numbers


def all_linear(model: nn.Module, layers: dict[str, Any]) -> list[str]:
    """Return the paths of the linear layers among `layers`, those of experts too, but for the head.

    The head stands outside the blocks and has an output for each row of an embedding.
    """
    rows = {layer.weight.shape[0] for layer in layers.values() if isinstance(layer, EMBEDDINGS)}
    inside = tuple(blocks(model))
    return [
        path
        for path, layer in layers.items()
        if not isinstance(layer, EMBEDDINGS) and (path.startswith(inside) or layer.weight.shape[0] not in rows)
    ]


def target_paths(paths: Sequence[str], targets: Sequence[str] | str) -> list[str]:
    r"""Return the sorted `paths` that `targets` name; raises ModelError for a target without any.

    A list has names, which are the last components of a path. One text is a regular expression for the whole path.

    >>> target_paths(["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"], ["self_attn.q_proj"])
    ['layers.0.self_attn.q_proj']
    >>> target_paths(["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"], r".*\.(up|down)_proj")
    ['layers.0.mlp.up_proj']
    """
    if isinstance(targets, str):
        if found := sorted(path for path in paths if re.fullmatch(targets, path)):
            return found
        hint = f" Names stand in a list: [{targets}]." if re.fullmatch(r"[\w.]+", targets) else ""
        example = f", such as {paths[0]}" if paths else ""
        raise ModelError(f"lora.target_modules: {targets!r} matches the whole path of no layer{example}.{hint}")
    found_by = {target: [path for path in paths if f".{path}".endswith(f".{target}")] for target in targets}
    unmatched = [target for target, found in found_by.items() if not found]
    if unmatched or not targets:
        raise ModelError(unmatched_message(unmatched, sorted({path.rpartition(".")[2] for path in paths})))
    return sorted({path for found in found_by.values() for path in found})


def unmatched_message(unmatched: Sequence[str], names: Sequence[str]) -> str:
    """Return the error's text for `unmatched` target modules where the layers are called `names`."""
    near = [match for target in unmatched for match in difflib.get_close_matches(target, names, n=1)]
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    if "lm_head" in unmatched:
        hint = " The head is the embedding (tied weights), and an adapter on that adapts both."
    wrong = f"no layer is called {', '.join(unmatched)}" if unmatched else "no layer was named"
    return f"lora.target_modules: {wrong}.{hint} The layers that can have an adapter are {', '.join(names) or 'none'}."


def check_patterns(paths: Sequence[str], lora: LoRAConfig) -> None:
    """Raise ModelError for a rank or alpha pattern that matches no adapted layer."""
    for name, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(pattern, path) for path in paths):
                raise ModelError(f"lora.{name}: {pattern!r} matches none of the adapted layers, such as {paths[0]}.")


def check_ranks(layers: dict[str, Any], lora: LoRAConfig) -> None:
    """Tell of a rank above a layer's smaller side; raise ModelError where the start is cut out of that layer."""
    for path, layer in layers.items():
        if lora.rank_of(path) > (most := min(dimensions(layer))):
            text = f"lora.rank {lora.rank_of(path)} is more than {path} can use, which has rank {most} at most"
            if lora.init_lora_weights != "default":
                raise ModelError(f"{text}: init_lora_weights {lora.init_lora_weights} cannot start it.")
            log.warning("%s.", text)
            return


def check_bits(layers: dict[str, Any], lora: LoRAConfig) -> None:
    """Tell of a DoRA that mlx-lm cannot open: to its layer, b bits are 32 // b values a number (0.32.2)."""
    odd = [path for path, layer in layers.items() if 32 % getattr(layer, "bits", 1)]
    if lora.use_dora and odd:
        log.warning(
            "mlx-lm cannot open DoRA on layers of %d bits such as %s; merge it, or export it for PEFT.",
            layers[odd[0]].bits,
            odd[0],
        )
