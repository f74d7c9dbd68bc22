"""What was trained, opened again: to evaluate it, to answer with it, or to measure it beside its base model."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
from attrs import evolve

from mlx_trainer.build import base_arguments, build_data, method_of
from mlx_trainer.config import Config, ConfigError, DataConfig, ModelConfig
from mlx_trainer.evaluation import EvalMetrics
from mlx_trainer.export.peft import in_mlx_layout
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.adapter_config import CONFIG, TENSORS, lora_of
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.models.last_layers import blocks_named, unfreeze_last
from mlx_trainer.models.loading import open_tensors
from mlx_trainer.monitoring import setup_logging
from mlx_trainer.start import refer_to
from mlx_trainer.trainer import Trainer


def evaluate(config: Config, adapter: str | None = None, *, whole: bool = False) -> EvalMetrics:
    """Return loss and perplexity on the held-out rows of `config`, or on the `whole` dataset.

    Of preferences these are loss and rewards, with the training's own reference. Raises ConfigError where no row is
    held out, or no adapter has learned them.
    """
    if config.training.on_preferences and (adapter is None or lora_of(Path(adapter)) is None):
        raise ConfigError(f"training.method {config.training.method} is evaluated with an adapter; name its --adapter")
    if whole:
        config = evolve(config, data=whole_data(config.data))
    with setup_logging(level="WARNING"):
        kind, options = method_of(config)
        module = trained_module(config.model, adapter, kind, **options)
        if config.training.adapter is not None:
            refer_to(Path(config.training.adapter), module)
        data = build_data(config, module)
        loader = data.train_loader() if whole else data.validation_loader()
        if loader is None:
            raise ConfigError(f"{', '.join(config.data.train_paths)}: no row is held out; lower data.train_split")
        return Trainer().validate(module, loader)


def whole_data(data: DataConfig) -> DataConfig:
    """All rows of the dataset, each once whatever its weight, and none held out."""
    path = data.dataset_path if isinstance(data.dataset_path, str) else list(data.train_paths)
    return evolve(data, dataset_path=path, train_split=1.0, shuffle=False, validation_path=None)


def answering(model: ModelConfig, adapter: str | None = None) -> CausalLMModule:
    """Return `model`, with an adapter where one is given, loaded and ready for `generate` and `stream`."""
    with setup_logging(level="WARNING"):
        module = trained_module(model, adapter)
        module.setup("predict")
        return module


def trained_module(
    model: ModelConfig, adapter: str | None, kind: type[CausalLMModule] = CausalLMModule, **options: Any
) -> CausalLMModule:
    """Return `model` with the weights in the folder `adapter`, which may be PEFT's, or as it stands; loaded.

    With adapters it is a module of `kind`, made with `options`.
    """
    arguments, name = base_arguments(model), model.model_name
    if adapter is None:
        return BaseModel(name, **arguments)
    with in_mlx_layout(Path(adapter)) as folder:
        lora = lora_of(folder)
        module = BaseModel(name, **arguments) if lora is None else kind(name, lora=lora, **arguments, **options)
        if lora is None:
            unfreeze_last(module.model, blocks_named(open_tensors(folder / TENSORS)))
        module.load(folder)
    return module


class BaseModel(CausalLMModule):
    """A model as it stands, without adapters, to be measured and not trained."""

    def inject_lora(self, model: nn.Module) -> nn.Module:
        """Return the model unchanged."""
        return model


def base_name(adapter: Path) -> str | None:
    """Return the name of the model that an adapter was trained on, None where its configuration does not tell."""
    path = adapter / CONFIG
    written = read_json(path) if path.exists() else None
    name = written.get("model", written.get("base_model_name_or_path")) if isinstance(written, dict) else None
    return name if isinstance(name, str) else None
