"""An adapter in both layouts on one base: mlx-lm's own reading of one, PEFT's formula on the tensors of the other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_trainer.export.checking import Difference, difference, logits_of, same_function, sample_ids
from mlx_trainer.export.low_rank import Adapter
from mlx_trainer.export.mlx_layout import opened_by_mlx_lm
from mlx_trainer.export.peft import names
from mlx_trainer.export.peft.config import read_config
from mlx_trainer.export.peft.formula import PeftLayer, layers_of
from mlx_trainer.export.peft.layout import PREFIX, TENSOR, TENSORS
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.models.lora.targets import EMBEDDINGS

HALF = (mx.float16, mx.bfloat16)


def check_logits(model: nn.Module, adapter: Adapter, mlx: Path, peft: Path, *, exported: bool) -> Difference:
    """Return how far the logits of both layouts are apart on the base `model`; raises ModelError where they differ."""
    ids = sample_ids(vocabulary(model))
    originals = {path: layer for path, layer in layers_of(model).items() if path in adapter.layers}
    parameters: Any = tree_flatten(model.parameters())
    base, half = logits_of(model, ids), any(value.dtype in HALF for _, value in parameters)
    by_peft = logits_of(adapted(model, peft_layers(originals, peft)), ids)
    by_mlx = logits_of(opened_by_mlx_lm(adapted(model, originals), mlx), ids)
    expected, other = (by_mlx, by_peft) if exported else (by_peft, by_mlx)
    found = difference(expected, other)
    if not same_function(base, expected, other, half=half):
        raise ModelError(
            f"What was written of the adapter does not compute the same: {found}. Nothing was left behind."
        )
    return found


def peft_layers(originals: Mapping[str, Any], directory: Path) -> dict[str, PeftLayer]:
    """Return PEFT's layers over `originals`, from the tensors in `directory` as they stand."""
    config, tensors = read_config(directory), open_tensors(directory / TENSORS)
    found = {match[1] for name in tensors if (match := TENSOR.fullmatch(name))}
    spelling = {path: name for name, path in names.to_mlx(found).items()}

    def one(path: str, layer: Any) -> PeftLayer:
        name = spelling[path]
        at = f"{PREFIX}{name}."
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if isinstance(layer, EMBEDDINGS)
            else ("lora_A.weight", "lora_B.weight")
        )
        m = tensors.get(f"{at}lora_magnitude_vector", tensors.get(f"{at}lora_magnitude_vector.weight"))
        return PeftLayer(layer, tensors[at + a], tensors[at + b], config.scale(name), m)

    return {path: one(path, layer) for path, layer in originals.items()}


def vocabulary(model: Any) -> int:
    """Return how many rows the embedding of `model` has."""
    embeddings = [layer for layer in layers_of(model).values() if isinstance(layer, EMBEDDINGS)]
    return int(embeddings[0].weight.shape[0])


def adapted(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Return `model` with `layers` in place of those at their paths."""
    model.update_modules(tree_unflatten(list(layers.items())))
    return model
