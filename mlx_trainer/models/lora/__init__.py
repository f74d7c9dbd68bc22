"""LoRA: low-rank adapters beside frozen layers: the layers, where they go, how they start, how they are computed."""

from mlx_trainer.models.lora.injection import check_only_adapters_train, inject_lora, unfreeze
from mlx_trainer.models.lora.layers import (
    ADAPTER_NAMES,
    DoRALinear,
    Linear,
    LoRALinear,
    adapted_layers,
    base_of,
    dimensions,
    dropout_of,
    factors,
    is_adapter,
    rank_of,
    trainable,
)
from mlx_trainer.models.lora.projection import adapter_of, dropout_keys, project, shares_input
from mlx_trainer.models.lora.targets import chosen_layers, linear_layers, target_paths, unmatched_message

__all__ = [
    "ADAPTER_NAMES",
    "DoRALinear",
    "Linear",
    "LoRALinear",
    "adapted_layers",
    "adapter_of",
    "base_of",
    "check_only_adapters_train",
    "chosen_layers",
    "dimensions",
    "dropout_keys",
    "dropout_of",
    "factors",
    "inject_lora",
    "is_adapter",
    "linear_layers",
    "project",
    "rank_of",
    "shares_input",
    "target_paths",
    "trainable",
    "unfreeze",
    "unmatched_message",
]
