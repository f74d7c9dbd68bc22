"""Loading a base model and its tokenizer from a local directory in Hugging Face layout."""

import difflib
import logging
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import ModelSettings, found, normalised, read_config, read_json, window_of
from mlx_trainer.models.libraries import quiet_imports
from mlx_trainer.models.quantized import embed_as
from mlx_trainer.monitoring import visible
from mlx_trainer.safetensors_file import check_header, check_regular
from mlx_trainer.state import preserved_random_state

log = logging.getLogger("mlx_trainer.models")

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
CODE = ("model_file", "auto_map", "custom_pipeline")
"""Keys of config.json that name Python files."""


def load_model(
    directory: Path, *, dtype: str | None = "float16", lazy: bool = False, trust_remote_code: bool = False
) -> nn.Module:
    """Return the model in `directory`, in eval mode, its floating-point parameters as `dtype` and in memory.

    Packed weights of a quantized model stay as they are; their scales become `dtype`, since a scale of another type
    makes every activation float32. None leaves each type as it is in the files, and `lazy` reads nothing yet. MLX's
    random state is left alone. Raises ModelError.
    """
    settings = read_config(directory)
    refuse_odd_files(directory)
    refuse_remote_code(directory, settings, trust_remote_code)
    settings = normalised(settings, tensor_names(directory))
    with quiet_imports():
        from mlx_lm.utils import load_model as load

        check_model_type(directory, settings)
    try:
        with preserved_random_state():  # layers draw their first values, which the file's then replace
            model, _ = load(directory, lazy=True, model_config=settings, trust_remote_code=trust_remote_code)
        check_types(model, directory)
        if dtype is not None:
            cast(model, DTYPES[dtype])
        if not lazy:
            mx.eval(model.parameters())
    except ModelError:
        raise
    except Exception as error:  # a config.json can be wrong in as many ways as there are architectures
        text = " ".join(visible(str(error)).split())
        raise ModelError(f"The weights in {directory} do not fit its config.json: {text[:400]}") from error
    return model


def tell_lengths(model: nn.Module, settings: ModelSettings, name: str, longest: int) -> None:
    """Warn where rows of `longest` tokens are more than the model knows, or than it computes as transformers does.

    A layer with a sliding window has a cache which rotates. mlx-lm has none for Mistral v0.1, Gemma 2, Phi 3 and
    Mixtral, whose layers then see all positions.
    """
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    positions, window = settings.get("max_position_embeddings"), window_of(settings)
    if isinstance(positions, int) and longest > positions:
        log.warning("max_seq_length is %d, but %s knows %d positions.", longest, name, positions)
    if window is None or longest <= window:
        return
    if not any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(model)):
        log.warning(
            "%s looks %d positions back, but in mlx-lm its layers see all: rows of more than %d tokens, which "
            "max_seq_length %d allows, are not computed as transformers does.",
            *(name, window, window, longest),
        )


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Turn floating-point parameters into `dtype`, but those that the architecture keeps precise (`cast_predicate`)."""
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def convert(name: str, value: mx.array) -> mx.array:
        return value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) and wanted(name) else value

    model.update(tree_map_with_path(convert, model.parameters()))
    embed_as(model, dtype)


def refuse_remote_code(directory: Path, settings: ModelSettings, trusted: bool) -> None:
    """Raise ModelError where the model brings Python code of its own and nobody has agreed to that.

    mlx-lm has run `model_file` on a plain load (CVE-2026-5843); `auto_map` and `custom_pipeline` are run by
    transformers, diffusers and what else opens the trained model, never here.
    """
    if found := [key for key in CODE if settings.get(key) is not None and not trusted]:
        raise ModelError(
            f"The model in {directory} runs its own code ({settings[found[0]]!s:.80}). Read that file, and pass "
            f"trust_remote_code=True if you trust it; or take {', '.join(found)} out of its config.json."
        )


def refuse_odd_files(directory: Path) -> None:
    """Raise ModelError where a file that mlx-lm or transformers may open is a pipe, a device or a folder."""
    for path in directory.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors"):
            try:
                check_regular(path)
            except ValueError as error:
                raise ModelError(f"{error}.") from error


def check_types(model: nn.Module, directory: Path) -> None:
    """Raise ModelError where a plain layer has integers for weights: MLX takes them and computes something else."""
    plain = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.LayerNorm)
    for path, layer in model.named_modules():
        for name, value in layer.items() if type(layer) in plain else ():
            if isinstance(value, mx.array) and not mx.issubdtype(value.dtype, mx.floating):
                raise ModelError(f"The weights in {directory} have {path}.{name} as {value.dtype}, which is no float.")


def check_model_type(directory: Path, settings: ModelSettings) -> None:
    """Raise ModelError, with the nearest known names, where mlx-lm has no architecture for the model type."""
    from mlx_lm import models
    from mlx_lm.utils import MODEL_REMAPPING

    known = {module.name for module in pkgutil.iter_modules(models.__path__)} | set(MODEL_REMAPPING)
    kind = settings["model_type"]
    if kind not in known and "model_file" not in settings:
        near = difflib.get_close_matches(kind, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f'{directory / "config.json"}: mlx-lm has no architecture for model_type "{kind}".{hint}')


def tensor_names(directory: Path) -> set[str]:
    """Return the names of all tensors in model*.safetensors, reading headers only; raises ModelError."""
    paths = sorted(directory.glob("model*.safetensors"))
    index = directory / "model.safetensors.index.json"
    try:
        shards = set(map(str, read_json(index)["weight_map"].values())) if index.exists() else set()
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a table of weights: {error}.") from error
    if missing := sorted(shards - {path.name for path in paths}):
        raise ModelError(
            f"{directory} lacks {len(missing)} of its {len(shards)} weight files: {', '.join(missing[:5])}."
        )
    if not paths:
        raise ModelError(f"{directory} has no weights (model*.safetensors); {found(directory)}.")
    return {name for path in paths for name in open_tensors(path)}


def open_tensors(path: Path) -> dict[str, mx.array]:
    """Return the tensors of a safetensors file, not read yet; raises ModelError where its header is broken."""
    try:
        check_header(path)
        tensors = mx.load(str(path), format="safetensors")
    except ValueError as error:
        raise ModelError(f"{error}.") from error
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{path} is not a complete safetensors file: {error}") from error
    assert isinstance(tensors, dict)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, mx.array], *, layout: str = "mlx") -> None:
    """Write a safetensors file whose names and shapes are those of `layout`: "mlx", or "pt", PyTorch's; raises OSError.

    transformers wants to be told, mlx-lm does not read it.
    """
    # Through a file object: a full disk is then an OSError with its number, not a bare RuntimeError.
    with path.open("wb") as file:
        mx.save_safetensors(file, dict(tensors), metadata={"format": layout})


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the transformers tokenizer in `directory`; raises ModelError where there is none or it cannot be read."""
    if not any(any(directory.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "*.model", "*.tiktoken")):
        raise ModelError(f"{directory} has no tokenizer (tokenizer.json); {found(directory)}.")
    with quiet_imports():
        from transformers import AutoTokenizer
    try:
        refuse_odd_files(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception on a broken tokenizer.json
        raise ModelError(f"The tokenizer in {directory} cannot be read: {error}") from error
