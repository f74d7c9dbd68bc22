"""Typed, frozen configuration: the schema, its files with `extends` and overrides, and errors that name the key."""

from mlx_trainer.config.dump import to_yaml
from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.loading import deep_merge, load_config
from mlx_trainer.config.rules import unwise
from mlx_trainer.config.schema import (
    AdaLoRAConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LoRAConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)

__all__ = [
    "AdaLoRAConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "LoRAConfig",
    "ModelConfig",
    "RunConfig",
    "TrainingConfig",
    "deep_merge",
    "load_config",
    "to_yaml",
    "unwise",
]
