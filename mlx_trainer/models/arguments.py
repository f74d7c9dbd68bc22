"""What a module is told: what cannot be, and what of it decides on the trained numbers."""

from typing import Any

from attrs import asdict

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import DTYPES
from mlx_trainer.models.recomputation import POLICIES


def told(lora: LoRAConfig) -> dict[str, Any]:
    """Return the options of `lora` by the names of a fingerprint; younger ones where they are not the default."""
    always = ("rank", "alpha", "dropout", "target_modules")
    options = asdict(lora, filter=lambda option, value: option.name in always or value != option.default)
    return {f"lora_{name}": value for name, value in options.items()}


def check_recompute(recompute: str) -> None:
    """Raise ModelError for an unknown policy."""
    if recompute not in ("auto", *POLICIES):
        raise ModelError(f"recompute {recompute!r} is unknown; it is one of auto, {', '.join(POLICIES)}.")


def check_method(lora: LoRAConfig | None, loraplus_lr_ratio: float | None, trainable_layers: int | None) -> None:
    """Raise ModelError for an option without adapters that is for them, and for blocks that are named twice."""
    if lora is None and loraplus_lr_ratio is not None:
        raise ModelError("loraplus_lr_ratio is for adapters, and lora=None has none; leave it out.")
    if lora is not None and lora.layers_to_transform is not None and trainable_layers is not None:
        raise ModelError("trainable_layers and lora.layers_to_transform both choose blocks; leave one of them out.")


def check_dtype(dtype: str, *, full: bool) -> None:
    """Raise ModelError for an unknown type, and for full fine-tuning in float16, where Adam's 1e-8 is 0 and divides."""
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown; it is one of {', '.join(DTYPES)}.")
    if full and dtype == "float16":
        raise ModelError(
            'Full fine-tuning (lora=None) in float16 loses its updates; use dtype="float32" or "bfloat16".'
        )
