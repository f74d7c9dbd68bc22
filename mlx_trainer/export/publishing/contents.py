"""What a folder holds for others: which kind it is, which files belong to that, and whether they are whole."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from attrs import frozen

from mlx_trainer.models import ModelError
from mlx_trainer.models.adapters import check_finite
from mlx_trainer.models.hf_config import found, read_json
from mlx_trainer.models.loading import open_tensors, tensor_names
from mlx_trainer.monitoring import mask_secrets

TEXTS = ("README.md", "LICENSE*", "NOTICE*")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
)


@frozen
class Kind:
    """A layout: what it is called, and its files as patterns. `settings` and one of `weights` have to be there."""

    name: str
    settings: str
    weights: str
    others: Sequence[str]
    base_key: str  # where `settings` names the base model

    def owns(self, name: str) -> bool:
        """Whether a file of this name belongs to the layout."""
        return name == self.settings or any(fnmatch(name, part) for part in (self.weights, *self.others, *TEXTS))


ADAPTER = Kind("mlx-lm adapter", "adapter_config.json", "adapters.safetensors", (), "model")
PEFT = Kind("PEFT adapter", "adapter_config.json", "adapter_model.safetensors", TOKENIZER, "base_model_name_or_path")
MODEL = Kind(
    "merged model",
    "config.json",
    "model*.safetensors",
    ("model.safetensors.index.json", "generation_config.json", *TOKENIZER),
    "_name_or_path",
)
KINDS = (ADAPTER, PEFT, MODEL)


@frozen
class Contents:
    """A whole folder of one kind: its files, what else lies there, and its settings as JSON values."""

    folder: Path
    kind: Kind
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def quantized(self) -> bool:
        """Whether MLX's quantized weights are in it, which no other program reads."""
        return "quantization" in self.settings

    @property
    def full(self) -> bool:
        """Whether it holds all weights and needs no base."""
        return self.kind is MODEL or self.settings.get("fine_tune_type") == "full"


def contents_of(folder: Path) -> Contents:
    """Return what `folder` holds; only plain files directly in it count, links that lead out of it do not.

    Reads all weights. Raises ModelError where it is no folder, of no kind or of two, where a file is missing or broken,
    where a weight is not finite, or where a text holds an access token.
    """
    kind = kind_of(folder)
    inside = {path.name for path in folder.iterdir() if path.is_file() and is_inside(path, folder)}
    files = tuple(sorted(name for name in inside if kind.owns(name)))
    left_out = tuple(sorted({path.name for path in folder.iterdir()} - set(files)))
    for pattern in (kind.settings, kind.weights):
        if not any(fnmatch(name, pattern) for name in files):
            raise ModelError(f"{folder} is no whole {kind.name}: {pattern} is missing; {found(folder)}.")
    settings = read_json(folder / kind.settings)
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / kind.settings} is no table of settings.")
    contents = Contents(folder, kind, files, left_out, settings)
    check_weights(contents)
    check_texts(contents)
    return contents


def kind_of(folder: Path) -> Kind:
    """Return the one kind whose weights lie in `folder`; raises ModelError."""
    if not folder.is_dir():
        raise ModelError(f"There is no folder {folder}; give one with an adapter or a merged model.")
    kinds = [kind for kind in KINDS if any(folder.glob(kind.weights))]
    if len(kinds) > 1:
        raise ModelError(
            f"{folder} holds more than one kind ({', '.join(kind.name for kind in kinds)}); give each its own folder."
        )
    if not kinds:
        hint = f" Did you mean {folder / 'adapter'}?" if (folder / "adapter").is_dir() else ""
        wanted = ", ".join(f"{kind.weights} ({kind.name})" for kind in KINDS)
        raise ModelError(f"{folder} has no weights of a kind that can be handed over: {wanted}; {found(folder)}.{hint}")
    return kinds[0]


def is_inside(path: Path, folder: Path) -> bool:
    """Whether what `path` leads to lies in `folder`."""
    return path.resolve().is_relative_to(folder.resolve())


def check_weights(contents: Contents) -> None:
    """Raise ModelError where a weight file is missing, broken or holds NaN or infinity."""
    if contents.kind is MODEL:
        tensor_names(contents.folder)
    for name in contents.files:
        if name.endswith(".safetensors"):
            tensors = open_tensors(contents.folder / name)
            for tensor in list(tensors):  # one at a time, or a whole shard would stand in memory
                check_finite({tensor: tensors.pop(tensor)}, contents.folder / name)


def check_texts(contents: Contents) -> None:
    """Raise ModelError where a file that is no weights holds an access token."""
    for name in contents.files:
        path = contents.folder / name
        if not name.endswith((".safetensors", ".model", "tokenizer.json")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if mask_secrets(text) != text:
                raise ModelError(f"{path} holds an access token; take it out, and make it invalid on its site.")
