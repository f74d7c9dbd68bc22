"""An adapter merged into its base: a model folder that mlx-lm, and in the usual case transformers, open.

Each weight is `W + scale (A B)ᵀ` in float32, rounded once to the type that is written. How much of the adapter's effect
the rounding cost is measured in the logits before the folder gets its name.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from attrs import asdict, evolve, frozen

from mlx_trainer.export.low_rank import Adapter
from mlx_trainer.export.merging.adapter import by_expert, read_adapter
from mlx_trainer.export.merging.base import Base, Packing, open_base, quantization_of
from mlx_trainer.export.merging.effect import Rows, measure_effect, measure_logits, sentence_rows
from mlx_trainer.export.merging.saving import Store, Tensors, copy_files, name_of, save_weights
from mlx_trainer.export.output import complete_folder
from mlx_trainer.models.arguments import check_dtype
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.hf_config import ModelSettings, write_json
from mlx_trainer.models.loading import DTYPES
from mlx_trainer.models.source import resolve

MAX_LOSS = 0.05
"""Share of the adapter's effect that rounding to a floating-point type may cost unless told otherwise."""


@frozen
class Merged:
    """A merged model: its folder, the `kind` of its weights ("float16", "4 bits"), how many the adapter changed.

    `effect` is the size of the adapter's effect relative to the base's logits, `lost` the share of it that is lost,
    both measured; `standard` tells whether transformers opens the folder.
    """

    directory: Path
    kind: str
    changed: int
    effect: float
    lost: float
    standard: bool

    def __str__(self) -> str:
        """What became of the adapter, for people."""
        programs = "mlx-lm and transformers" if self.standard else "mlx-lm"
        advice = f" To lose less, {self.advice}." if self.lost > MAX_LOSS else ""
        return (
            f"{self.directory}: {self.changed} weights merged into {self.kind}, for {programs}; "
            f"{percent(self.lost)} of the adapter's effect is lost.{advice}"
        )

    @property
    def advice(self) -> str:
        """What would lose less of the effect."""
        other = "use --dtype float32" if self.kind in DTYPES else "leave --requantize out, or take more --bits"
        return f"{other}, or keep the adapter beside its base"


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    requantize: bool = False,
    bits: int | None = None,
    max_loss: float | None = None,
    rows: Rows | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Write the base model with the adapter merged into it to the new folder `output`, and tell what that cost.

    `base` is a folder or Hub name, by default the one that the adapter names. `dtype` is float16, bfloat16 or float32,
    by default each weight keeps its own. A quantized base is dequantized, or with `requantize` packed again as it was,
    or to `bits`. The loss is measured on `rows` of token ids (default: eight sentences) and refused above `max_loss`:
    by default 0.05 without `requantize`, anything with it. Raises ModelError; nothing is left then.
    """
    check_options(dtype, max_loss)
    read = read_adapter(adapter)
    source = base_directory(read, base)
    read = by_expert(read, source)
    keep_packed = requantize and bits is None  # what the adapter leaves alone then stays as it is, bit for bit
    opened = open_base(source, read.targets, keep_packed=keep_packed, trust_remote_code=trust_remote_code)
    packing = packing_for(opened, requantize, bits)
    with mx.stream(mx.cpu):  # float32 as it is whichever the device: CUDA multiplies in TF32
        merge_into(opened.weights, read)
    with complete_folder(output) as folder:
        rows = sentence_rows(source) if rows is None else rows
        effect = measure_effect(source, adapter, rows, trust_remote_code=trust_remote_code)
        with mx.stream(mx.cpu):
            save_weights(folder, opened.weights, rounding(opened, dtype, packing))
        write_json(folder / "config.json", merged_settings(opened, dtype, packing))
        copy_files(source, folder, code=trust_remote_code)
        lost = effect.lost(measure_logits(folder, rows, trust_remote_code=trust_remote_code))
        standard = opened.standard and not packing
        result = Merged(output, kind_of(opened, dtype, packing), len(read.targets), effect.size, lost, standard)
        check_loss(result, math.inf if requantize and max_loss is None else max_loss)
    return result


def check_options(dtype: str | None, max_loss: float | None) -> None:
    """Raise ModelError for a type that is unknown, and a loss that is no share."""
    if dtype is not None:
        check_dtype(dtype, full=False)
    if max_loss is not None and not max_loss >= 0:
        raise ModelError(f"--max-loss is {max_loss:g}; it is a share, at least 0, such as 0.05.")


def base_directory(
    adapter: Adapter, base: str | None = None, *, revision: str | None = None, cache_dir: str | None = None
) -> Path:
    """Return the folder of the base model that is named, or that the adapter names; raises ModelError without any.

    A Hub name is downloaded as far as it is not in the cache; see `models.resolve`.
    """
    name = base or adapter.base
    if name is None:
        raise ModelError(f"{adapter.directory} does not name its base model; give it with --model.")
    return resolve(name, revision=revision, cache_dir=cache_dir)


def packing_for(base: Base, requantize: bool, bits: int | None) -> Mapping[str, Packing]:
    """Return how the merged layers are packed, by path; empty where they are not. Raises ModelError."""
    if not requantize:
        if bits is not None:
            raise ModelError(f"--bits {bits} is for --requantize, which packs the merged weights again.")
        return {}
    if not base.packing:
        raise ModelError("--requantize is for a quantized base; merge this one, then use `mlx_lm.convert -q`.")
    if bits is None:
        return base.packing
    if modes := {how.mode for how in base.packing.values()} - {"affine"}:
        raise ModelError(f"--bits {bits} does not go with {modes.pop()}, whose bits are fixed; leave it out.")
    if bits not in (2, 3, 4, 5, 6, 8):
        raise ModelError(f"--bits is {bits}; MLX packs to 2, 3, 4, 5, 6 or 8.")
    return {path: evolve(how, bits=bits) for path, how in base.packing.items()}


def merge_into(weights: dict[str, mx.array], adapter: Adapter) -> None:
    """Change lazy `weights` as the adapter says, to float32; raises ModelError where a layer does not fit.

    In place: who held on to the base's arrays would hold all of the base in memory once they are computed.
    """
    for path, layer in adapter.layers.items():
        name = f"{path}.weight"
        try:
            weights[name] = layer.merged(weights[name])
        except ValueError as error:
            raise ModelError(f"{path}: {error}; give the base model that {adapter.directory} was trained on.") from None
    weights |= adapter.weights


def rounding(base: Base, dtype: str | None, packing: Mapping[str, Packing]) -> Store:
    """Return what makes of a merged weight the tensors that are stored: rounded once, or packed."""

    def store(name: str, value: mx.array) -> Tensors:
        if not mx.issubdtype(value.dtype, mx.floating):
            return {name: value}
        kind = base.dtypes.get(name, base.dtype) if dtype is None else DTYPES[dtype]
        path = name.removesuffix(".weight")
        return packed(path, value, packing[path], kind) if path in packing else {name: value.astype(kind)}

    return store


def packed(path: str, weight: mx.array, how: Packing, dtype: mx.Dtype) -> Tensors:
    """Return the packed `weight`, its scales and its biases where the mode has them, under their names."""
    parts = mx.quantize(weight, **asdict(how))
    names = (f"{path}.weight", f"{path}.scales", f"{path}.biases")
    return {
        name: part.astype(dtype) if mx.issubdtype(part.dtype, mx.floating) else part
        for name, part in zip(names, parts, strict=False)  # no biases but in affine mode
    }


def merged_settings(base: Base, dtype: str | None, packing: Mapping[str, Packing]) -> ModelSettings:
    """Return config.json of the merged model: the base's, with the type and the quantization that the files now have.

    mlx-lm reads `torch_dtype`, transformers 5 `dtype`.
    """
    settings = dict(base.settings)
    parts = [settings]
    if isinstance(text := settings.get("text_config"), dict):
        settings["text_config"] = dict(text)
        parts.append(settings["text_config"])
    for part in parts:
        part.pop("quantization", None)
        part.pop("quantization_config", None)
        part["torch_dtype"] = part["dtype"] = dtype or name_of(base.dtype)
    if packing:
        settings["quantization"] = settings["quantization_config"] = quantization_of(packing)
    return settings


def kind_of(base: Base, dtype: str | None, packing: Mapping[str, Packing]) -> str:
    """What the merged weights are, for people."""
    if not packing:
        return dtype or name_of(base.dtype)
    kinds = sorted({f"{how.bits} bits" if how.mode == "affine" else how.mode for how in packing.values()})
    return " and ".join(kinds)


def check_loss(merged: Merged, limit: float | None) -> None:
    """Raise ModelError where more than `limit` of the adapter's effect is lost, or it has none that could be seen."""
    limit = MAX_LOSS if limit is None else limit
    if not math.isfinite(merged.lost):
        raise ModelError("The adapter changes nothing on these rows, or the logits are not finite; give other --data.")
    if merged.lost > limit:
        raise ModelError(
            f"Merged into {merged.kind}, {percent(merged.lost)} of the adapter's effect is lost, more than --max-loss "
            f"{limit:g}. Its effect, {percent(merged.effect)} of the logits, is small beside the rounding; "
            f"{merged.advice}, or raise --max-loss."
        )


def percent(share: float) -> str:
    """Return a share for people.

    >>> percent(0.9512), percent(0.00031), percent(12.5)
    ('95 %', '0.031 %', '1,250 %')
    """
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
