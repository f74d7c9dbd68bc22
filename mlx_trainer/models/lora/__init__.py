"""LoRA: low-rank adapters beside frozen layers: the layers, where they go, how they start, how they are computed."""

from mlx_trainer.models.lora.injection import check_only_adapters_train, inject_lora, unfreeze
from mlx_trainer.models.lora.layers import (
    ADAPTER_NAMES,
    Linear,
    LoRALinear,
    adapted_layers,
    base_of,
    dimensions,
    dropout_of,
    trainable,
)
from mlx_trainer.models.lora.projection import adapter_of, dropout_keys, project, shares_input
from mlx_trainer.models.lora.targets import linear_layers, target_paths, unmatched_message

__all__ = [
    "ADAPTER_NAMES",
    "Linear",
    "LoRALinear",
    "adapted_layers",
    "adapter_of",
    "base_of",
    "check_only_adapters_train",
    "dimensions",
    "dropout_keys",
    "dropout_of",
    "inject_lora",
    "linear_layers",
    "project",
    "shares_input",
    "target_paths",
    "trainable",
    "unfreeze",
    "unmatched_message",
]
