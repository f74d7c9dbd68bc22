"""`MistralLoRAModule`: the module for Mistral models."""

import os
from typing import Any

import mlx.nn as nn

from mlx_trainer.models.causal_lm import CausalLMModule
from mlx_trainer.models.error import ModelError

DEFAULT_MODEL = "mistralai/Mistral-7B-Instruct-v0.3"


class MistralLoRAModule(CausalLMModule):
    """A `CausalLMModule` that takes Mistral models only, and Mistral-7B-Instruct-v0.3 where none is named."""

    def __init__(self, model_name_or_path: str | os.PathLike[str] = DEFAULT_MODEL, **arguments: Any) -> None:
        super().__init__(model_name_or_path, **arguments)

    def load_model(self) -> nn.Module:
        """Return the base model; raises ModelError, before any weight is read, where it is no Mistral."""
        kind = self.settings["model_type"]
        if kind != "mistral":
            raise ModelError(f'{self.name} has model_type "{kind}", not "mistral"; use CausalLMModule for it.')
        return super().load_model()
