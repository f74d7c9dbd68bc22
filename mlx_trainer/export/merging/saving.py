"""A model folder in Hugging Face's layout: complete or absent, its weights written tensor by tensor."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import write_json
from mlx_trainer.models.loading import write_tensors
from mlx_trainer.models.source import TOKENIZER_FILES

SHARD_BYTES = 5 << 30
"""What transformers and mlx-lm let a file of weights have at most, where one tensor is no larger by itself."""
REWRITTEN = ("config.json", "model.safetensors.index.json", "adapter_config.json", "hf_quant_config.json")
Tensors = Mapping[str, mx.array]
Store = Callable[[str, mx.array], Tensors]


def save_weights(
    directory: Path, weights: dict[str, mx.array], store: Store, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write what `store` makes of each of the lazy `weights`, which are taken out, as model*.safetensors.

    In memory is no more than one file and the tensor that is being computed. Raises ModelError where a value is not
    finite or the disk has no room, OSError where it takes no more.
    """
    sizes = {name: sum(part.nbytes for part in store(name, value).values()) for name, value in weights.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(directory).free
    if total > free:
        raise ModelError(f"{directory.parent} has room for {free:,} bytes, the model needs {total:,}; free some.")
    shards, where = shards_of(sizes, shard_bytes), dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, mx.array] = {}
        for name in names:
            tensors |= computed(name, weights.pop(name), store)
        write_tensors(directory / file, tensors, layout="pt")
        where |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_json(directory / "model.safetensors.index.json", index)


def shards_of(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Return names in their order, so many together that their sizes add up to `most` bytes, or one that has more.

    >>> shards_of({"a": 3, "b": 3, "c": 9, "d": 1}, 7)
    [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    return shards


def computed(name: str, value: mx.array, store: Store) -> Tensors:
    """Return what is stored of `value`, in memory; raises ModelError where it is not finite."""
    stored = store(name, value)
    mx.eval(stored)
    if all(finite(part) for part in stored.values()):
        return stored
    if finite(value):
        highest = float(mx.abs(value).max())
        kinds = ", ".join(sorted({name_of(part.dtype) for part in stored.values()}))
        raise ModelError(f"{name} has {highest:.3g}, which is too large for {kinds}; use --dtype bfloat16 or float32.")
    raise ModelError(f"{name} is not finite once merged: the base or the adapter is damaged, or far too large.")


def name_of(dtype: mx.Dtype) -> str:
    """Return "float16" for mx.float16, and so on."""
    return str(dtype).rpartition(".")[2]


def finite(value: mx.array) -> bool:
    """Whether all of an array, of whichever type, is finite."""
    return not mx.issubdtype(value.dtype, mx.floating) or bool(mx.isfinite(value).all().item())


def copy_files(source: Path, target: Path, *, code: bool = False) -> None:
    """Copy the tokenizer, its chat template and generation_config.json as they are, and with `code` Python files."""
    for pattern in (*TOKENIZER_FILES, *(("*.py",) if code else ())):
        for path in source.glob(pattern):
            if path.name not in REWRITTEN:
                shutil.copyfile(path, target / path.name)
