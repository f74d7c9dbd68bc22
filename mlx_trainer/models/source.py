"""From a model's name to a local directory: a folder as it stands, or a snapshot of a Hub repository."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hub_errors import explained, hub_errors

TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "*.tiktoken")
MODEL_FILES = ("model*.safetensors", *TOKENIZER_FILES)
ADAPTER_FILES = ("adapters.safetensors", "adapter_model.safetensors", *TOKENIZER_FILES)
# Mistral's repositories hold the weights a second time under these names; fetching them would double the download.
DUPLICATES = ("consolidated*", "tekken.json")


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    files: Sequence[str] = MODEL_FILES,
) -> Path:
    """Return the directory of a local model, or of a Hub model after downloading what is missing of `files`.

    `revision` pins a branch, tag or commit of the Hub; `cache_dir` is Hugging Face's home folder (the snapshots lie in
    its `hub`) or the snapshots' folder itself. Without a network the cache answers. Raises ModelError.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError(f"revision {revision!r} was given, but {path} is a local folder, which has no revisions.")
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with config.json, weights and a tokenizer.")
    name = os.fspath(name_or_path)
    if looks_local(name):
        raise ModelError(f"There is no folder {name}. Give an existing folder, or a Hub name such as owner/model.")
    return snapshot(name, revision, hub_cache(cache_dir), files)


def commit_of(directory: Path) -> str | None:
    """Return the Hub's commit of a snapshot in the cache, None for any other folder."""
    name = directory.name
    return name if directory.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", name) else None


def looks_local(name: str) -> bool:
    """Tell whether `name` can only mean a path: it starts like one, or has more than the one slash of a Hub name."""
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith("/")


def hub_cache(cache_dir: str | os.PathLike[str] | None) -> Path | None:
    """Return the folder of the `models--*` snapshots for a Hugging Face home folder; None means the library's own."""
    if cache_dir is None:
        return None
    directory = Path(cache_dir).expanduser()
    return directory if any(directory.glob("models--*")) else directory / "hub"


def snapshot(name: str, revision: str | None, cache: Path | None, files: Sequence[str]) -> Path:
    """Return the local snapshot of Hub repository `name`, downloading what is missing; raises ModelError."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name, revision=revision, cache_dir=cache, allow_patterns=list(files), ignore_patterns=list(DUPLICATES)
        )
    except hub_errors() as error:
        raise ModelError(explained(error, name, revision)) from error
    return Path(found)
