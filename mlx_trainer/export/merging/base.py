"""The weights that an adapter is merged into, by name and not read yet, packed ones as what they stand for."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
from attrs import asdict, evolve, frozen
from mlx.utils import tree_flatten

from mlx_trainer.export.peft.names import SAME_NAMES
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import ModelSettings, normalised, read_config
from mlx_trainer.models.loading import load_model, open_tensors, refuse_odd_files, tensor_names
from mlx_trainer.models.quantized import dequantize


@frozen
class Packing:
    """How a layer's weight is packed: MLX's quantization."""

    group_size: int
    bits: int
    mode: str = "affine"


@frozen
class Base:
    """A base model's `settings` (config.json) and `weights`, which are lazy; `packing` by the paths of packed layers.

    `dtypes` are the types of the weights that are not packed, `dtype` the one that most of them have. `standard` tells
    whether the names are Hugging Face's, so that transformers opens the weights too.
    """

    settings: ModelSettings
    weights: dict[str, mx.array]
    packing: Mapping[str, Packing]
    dtypes: Mapping[str, mx.Dtype]
    dtype: mx.Dtype
    standard: bool

    @classmethod
    def of(
        cls, settings: ModelSettings, tensors: Mapping[str, mx.array], packing: Mapping[str, Packing], standard: bool
    ) -> Self:
        """Return the base model with these tensors, packed as they are."""
        dtypes = {name: value.dtype for name, value in tensors.items() if name.removesuffix(".weight") not in packing}
        return cls(settings, dict(tensors), packing, dtypes, main_dtype(tensors), standard)


def open_base(
    directory: Path, targets: Collection[str], *, keep_packed: bool = False, trust_remote_code: bool = False
) -> Base:
    """Return the weights in `directory`, under their names in its files where `targets` are among these.

    Else, as with a quantization that is not MLX's, as mlx-lm loads them. `keep_packed`
    unpacks the targets alone. Raises ModelError where a target is in neither, since the adapter is then another
    model's.
    """
    refuse_odd_files(directory)
    names = tensor_names(directory)
    settings = normalised(read_config(directory), names)
    if not foreign(settings) and names.issuperset(targets):
        base = from_files(directory, settings)
    else:
        base = from_model(directory, settings, trust_remote_code)
    if missing := sorted(set(targets) - base.weights.keys()):
        raise ModelError(
            f"{directory} has no {missing[0]} ({len(missing)} of the adapter's {len(targets)} weights are missing); "
            "give the base model that it was trained on."
        )
    packed = {path: how for path, how in base.packing.items() if not keep_packed or f"{path}.weight" in targets}
    return evolve(base, weights=unpacked(base.weights, packed))


def foreign(settings: ModelSettings) -> bool:
    """Whether the weights are quantized in a way that is not MLX's."""
    return "quantization_config" in settings and "quantization" not in settings


def from_files(directory: Path, settings: ModelSettings) -> Base:
    """Return what the files hold, packed as it is."""
    paths = sorted(directory.glob("model*.safetensors"))
    tensors = {name: value for path in paths for name, value in open_tensors(path).items()}
    if settings["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)  # a second copy, which the merge would leave behind
    standard = not any(".switch_mlp." in name for name in tensors)
    standard &= settings["model_type"] in SAME_NAMES or any(written_format(path) == "pt" for path in paths)
    packing = {
        name.removesuffix(".scales"): packing_of(settings["quantization"], name.removesuffix(".scales"))
        for name in tensors
        if name.endswith(".scales") and "quantization" in settings
    }
    return Base.of(settings, tensors, packing, standard)


def from_model(directory: Path, settings: ModelSettings, trust_remote_code: bool) -> Base:
    """Return what mlx-lm makes of the files, under its names, packed as it is."""
    model = load_model(directory, dtype=None, lazy=True, trust_remote_code=trust_remote_code)
    tensors = dict(tree_flatten(model.parameters()))
    packing = {
        path: Packing(module.group_size, module.bits, module.mode)
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }
    standard = settings["model_type"] in SAME_NAMES
    return Base.of(settings, tensors, packing, standard)


def written_format(path: Path) -> str | None:
    """The format that a safetensors file says it has: "pt" where PyTorch's names and shapes are in it."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("format")


def packing_of(quantization: Mapping[str, Any], path: str) -> Packing:
    """Return how config.json says that the layer at `path` is packed; raises ModelError where it does not say."""
    own = quantization.get(path)
    words = own if isinstance(own, Mapping) else quantization
    try:
        return Packing(int(words["group_size"]), int(words["bits"]), str(words.get("mode", "affine")))
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"config.json does not say how {path} is quantized: {error!r}.") from error


def quantization_of(packing: Mapping[str, Packing]) -> dict[str, Any]:
    """Return the key "quantization" of config.json: what most layers have, and by path what the others have."""
    (common, _), *_ = Counter(packing.values()).most_common(1)
    return asdict(common) | {path: asdict(own) for path, own in packing.items() if own != common}


def unpacked(tensors: Mapping[str, mx.array], packing: Mapping[str, Packing]) -> dict[str, mx.array]:
    """Return `tensors` with one weight, float32, in place of each packed one with its scales and biases."""
    weights = dict(tensors)
    for path, how in packing.items():
        if f"{path}.global_scale" in weights:
            raise ModelError(f"{path} is nvfp4 with a global scale, which cannot be merged; use another base.")
        packed = weights[f"{path}.weight"], weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases", None)
        weights[f"{path}.weight"] = dequantize(*packed, mx.float32, **asdict(how))
    return weights


def main_dtype(tensors: Mapping[str, mx.array]) -> mx.Dtype:
    """The floating-point type that most values have."""
    sizes: Counter[mx.Dtype] = Counter()
    for value in tensors.values():
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] += value.size
    if not sizes:
        raise ModelError("The base model has no floating-point weights.")
    return sizes.most_common(1)[0][0]
