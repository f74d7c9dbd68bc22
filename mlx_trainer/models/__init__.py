"""Language models: loading, LoRA injection, loss, generation, and adapters on disk."""

from mlx_trainer.models.adalora import AdaLoRAModule
from mlx_trainer.models.adapters import load_adapters, save_adapters
from mlx_trainer.models.causal_lm import CausalLMModule
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model, load_tokenizer
from mlx_trainer.models.lora import LoRALinear, inject_lora
from mlx_trainer.models.mistral import MistralLoRAModule
from mlx_trainer.models.parameters import ParameterGroup, ParameterStats, parameter_stats
from mlx_trainer.models.source import resolve

__all__ = [
    "AdaLoRAModule",
    "CausalLMModule",
    "LoRALinear",
    "MistralLoRAModule",
    "ModelError",
    "ParameterGroup",
    "ParameterStats",
    "inject_lora",
    "load_adapters",
    "load_model",
    "load_tokenizer",
    "parameter_stats",
    "resolve",
    "save_adapters",
]
