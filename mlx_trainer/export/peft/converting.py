"""`to_peft` and `from_peft`: read, write beside, compare the logits of both on the base, and only then be there."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import evolve, frozen

from mlx_trainer.export.checking import Difference, share
from mlx_trainer.export.low_rank import Adapter
from mlx_trainer.export.mlx_layout import read_mlx, write_mlx
from mlx_trainer.export.output import complete_folder
from mlx_trainer.export.peft import layout, names
from mlx_trainer.export.peft.agreement import check_logits
from mlx_trainer.export.peft.formula import check_fits, layers_of
from mlx_trainer.export.peft.layout import is_peft, read_peft, write_peft
from mlx_trainer.models import source
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import read_config as read_settings
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora.layers import dense_weight
from mlx_trainer.models.lora.targets import EMBEDDINGS

Base = str | os.PathLike[str] | None


UNEVEN = (
    "It has rsLoRA, or ranks or alphas of single layers: programs that read lora_alpha alone, such as llama.cpp and "
    "Ollama, would scale it wrong. Export it with plain=True (--plain) for them."
)


@frozen
class Converted:
    """Where an adapter was written, in which layout, for how many layers, and what the check of its logits found."""

    directory: Path
    layout: str
    layers: int
    difference: Difference | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for people, and one for each note."""
        found = self.difference or "not checked: give the base model to compare the logits"
        return "\n".join([f"{self.layout} adapter in {self.directory}, {self.layers} layers: {found}", *self.notes])


def to_peft(
    adapter: Path, output: Path, base: Base = None, *, plain: bool = False, check: bool = True, **loading: Any
) -> Converted:
    """Write the mlx-lm `adapter` into the new or empty folder `output` as PEFT reads it.

    `base`, a folder or Hub name, is by default the one that the adapter names. Where it is at hand, or given, its
    logits with the adapter and with what was written are compared; `check=False` leaves that out. `plain` writes one
    rank and alpha without rsLoRA, for programs that read no more. `loading` may say `dtype` (float32), `revision` and
    `cache_dir`. Raises ModelError, and leaves nothing, for what PEFT's layout cannot carry, where the logits differ,
    and where `output` has something in it.
    """
    if is_peft(adapter):
        raise ModelError(f"{adapter} is a PEFT adapter already; from_peft (--to mlx) takes it the other way.")
    found = layout.plain(read_mlx(adapter)) if plain else read_mlx(adapter)
    done = convert(found, adapter, output, base, check=check, peft=True, **loading)
    return done if is_even(found) else evolve(done, notes=(*done.notes, UNEVEN))


def from_peft(adapter: Path, output: Path, base: Base = None, *, check: bool = True, **loading: Any) -> Converted:
    """Write the PEFT `adapter` into the new or empty folder `output` as mlx-lm, and a training here, reads it.

    The rest is as in `to_peft`. Raises ModelError by name for what mlx-lm cannot carry, such as `modules_to_save`.
    """
    found, weights = read_peft(adapter)
    return convert(found, adapter, output, base, check=check, peft=False, weights=weights, **loading)


def is_even(adapter: Adapter) -> bool:
    """Whether one rank and one alpha say all."""
    return not adapter.use_rslora and len({(layer.rank, layer.scale) for layer in adapter.layers.values()}) == 1


@contextmanager
def in_mlx_layout(adapter: Path) -> Iterator[Path]:
    """Give `adapter` as mlx-lm reads it: the folder itself, or of one of PEFT's a copy for the time being."""
    if not is_peft(adapter):
        yield adapter
        return
    found, weights = read_peft(adapter)
    check_weights(weights, None, adapter)
    with TemporaryDirectory() as folder:
        write_mlx(found, Path(folder))
        yield Path(folder)


def convert(
    adapter: Adapter,
    directory: Path,
    output: Path,
    base: Base,
    *,
    check: bool,
    peft: bool,
    weights: Mapping[str, mx.array] | None = None,
    **loading: Any,
) -> Converted:
    """Write `adapter`, read from `directory`, in the other layout; see `to_peft`."""
    adapter = adapter if base is None else evolve(adapter, base=os.fspath(base))
    if adapter.base is None:
        raise ModelError(f"{directory} names no base model, which both layouts have to; give it (--model).")
    model, notes = base_model(adapter, given=base is not None, check=check, **loading)
    layers = None if model is None else layers_of(model)
    if layers is not None:
        check_fits(adapter, layers, adapter.base)
        check_tied(adapter, layers)
    check_weights(weights or {}, layers, directory)
    with complete_folder(output) as new:
        if peft:
            write_peft(adapter, new, layers)
        else:
            write_mlx(adapter, new, layers)
        sides = (directory, new) if peft else (new, directory)
        found = None if model is None else check_logits(model, adapter, *sides, exported=peft)
    return Converted(output, "PEFT" if peft else "mlx-lm", len(adapter.layers), found, tuple(notes))


def base_model(
    adapter: Adapter,
    *,
    given: bool,
    check: bool,
    dtype: str = "float32",
    revision: str | None = None,
    cache_dir: Base = None,
) -> tuple[nn.Module | None, list[str]]:
    """Return the base model, None where it is not wanted or not at hand, and what is to be said about it."""
    if not check or adapter.base is None:
        return None, []
    if not given and not at_hand(adapter.base, cache_dir):
        return None, []
    directory = source.resolve(adapter.base, revision=revision, cache_dir=cache_dir, files=source.MODEL_FILES)
    kind = read_settings(directory)["model_type"]
    untried = kind not in names.SAME_NAMES and not any(path.startswith("language_model.") for path in adapter.layers)
    notes = [f"Whether transformers calls the layers of {kind} models the same was not tried."] if untried else []
    return load_model(directory, dtype=dtype), notes


def at_hand(name: str, cache_dir: Base) -> bool:
    """Whether base `name` is a folder here, or whole in the cache, so that nothing must be downloaded."""
    if Path(name).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", cache_dir=source.hub_cache(cache_dir))
    except HFValidationError:
        return False
    return isinstance(found, str) and any(Path(found).parent.glob("model*.safetensors"))


def check_tied(adapter: Adapter, layers: Mapping[str, Any]) -> None:
    """Raise ModelError for an adapter of an embedding that is the head too: mlx-lm adapts both, PEFT one."""
    embedding = next((path for path in adapter.layers if isinstance(layers[path], EMBEDDINGS)), None)
    if embedding is not None and not any(path.rpartition(".")[2] == "lm_head" for path in layers):
        raise ModelError(
            f"{embedding} is the model's head too: mlx-lm adapts both, PEFT one of them; merge it instead."
        )


def check_weights(weights: Mapping[str, mx.array], layers: Mapping[str, Any] | None, directory: Path) -> None:
    """Raise ModelError where base weights that PEFT has saved with the adapter are not the base's own."""
    for path, weight in weights.items():
        if layers is None or path not in layers:
            raise ModelError(
                f"{directory} has the base weight of {path}, perhaps resized or trained: give the base model "
                "to compare it with, or save the adapter with save_embedding_layers=False."
            )
        layer = layers[path]
        own = dense_weight(layer) if not hasattr(layer, "bits") else None
        if layer.weight.shape[0] != weight.shape[0] or (own is not None and share(weight - own, own) > 0.01):
            raise ModelError(
                f"{directory} has a base weight of {path} that is not the base's; merge the adapter in PEFT."
            )
