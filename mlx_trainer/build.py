"""From a configuration to module, data and trainer: what the command line and the YAML recipes use.

Everything that can be wrong with the inputs is found before the run folder is made, so a refused run leaves nothing.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attrs import asdict

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import (
    EMA,
    EarlyStopping,
    Evaluation,
    GradientClipping,
    Ledger,
    LossSpike,
    MemoryMonitor,
    MetricsLogger,
    ModelCheckpoint,
    NaNGuard,
    ProgressBar,
    SampleGenerator,
    TensorBoardLogger,
)
from mlx_trainer.config import Config, ModelConfig, unwise
from mlx_trainer.data import DataPipeline, DataReport, render, report_on
from mlx_trainer.models import AdaLoRAModule, CausalLMModule, MistralLoRAModule
from mlx_trainer.monitoring import make_folder, setup_logging
from mlx_trainer.preference import DPOModule, ORPOModule, precompute_reference
from mlx_trainer.run_folder import (
    as_begun,
    check_run_directory,
    description,
    goes_on,
    leave_report,
    refuse_secrets,
    resolved_config,
    run_directory,
    tell,
)
from mlx_trainer.start import begin_at
from mlx_trainer.trainer import Trainer, TrainingResult

log = logging.getLogger("mlx_trainer.build")

EXAMPLES = 2
"""Training rows that are shown before a training, and kept in its folder."""


def train(config: Config) -> TrainingResult:
    """Train as `config` says, in a run folder that holds the resolved configuration and the environment.

    Raises ConfigError, DataError or ModelError before anything is written, TrainingError during the training.
    """
    refuse_secrets(config)
    with setup_logging():
        for sentence in unwise(config):
            log.warning("%s", sentence)
        run_dir = run_directory(config)
        check_run_directory(run_dir, config.run.resume)
        config = as_begun(config, run_dir)
        module = build_module(config)
        data = build_data(config, module)
        report = build_report(config, data, module, EXAMPLES)
        tell(report)
        prepare(config, module, data, resumed=goes_on(run_dir, config.run.resume))
    with setup_logging(make_folder(run_dir)):
        resolved = resolved_config(config, run_dir, module)
        describing = description(resolved, module, report)
        trainer = build_trainer(resolved, run_dir, describing, evaluating=bool(data.validation_rows))
        try:
            return trainer.fit(module, data)
        finally:
            if trainer.step_output is not None or not (run_dir / "report.html").exists():
                leave_report(run_dir)


def inspect(config: Config, rows: int = 2) -> DataReport:
    """Return what the data of `config` becomes, with its first `rows` training rows as text; loads no weights."""
    with setup_logging(level="WARNING"):
        module = build_module(config)
        return build_report(config, build_data(config, module), module, rows)


def build_module(config: Config) -> CausalLMModule:
    """Return the module that `config` describes; the model itself is loaded at its `setup`."""
    training = config.training
    lora = None if training.method == "full" else config.lora
    optimization = {
        "learning_rate": training.learning_rate,
        "optimizer": training.optimizer,
        "schedule": training.schedule,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "loraplus_lr_ratio": training.loraplus_lr_ratio,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "trainable_layers": training.trainable_layers,
    }
    own = {"lora": lora, "recompute": training.recompute, "seed": config.data.seed}
    kind, options = method_of(config)
    if config.adalora.target_r is not None:
        kind, options = AdaLoRAModule, {"adalora": config.adalora}
    arguments = base_arguments(config.model) | optimization | own | options
    module = kind(config.model.model_name, **arguments)
    if kind is CausalLMModule and lora is not None and module.settings["model_type"] == "mistral":
        return MistralLoRAModule(config.model.model_name, **arguments)
    return module


def method_of(config: Config) -> tuple[type[CausalLMModule], dict[str, Any]]:
    """Return the class of module that `training.method` asks for, and the options of its loss."""
    chosen = config.preference
    dpo = {"beta": chosen.beta, "loss_type": chosen.loss_type, "label_smoothing": chosen.label_smoothing}
    methods: dict[str, tuple[type[CausalLMModule], dict[str, Any]]] = {
        "dpo": (DPOModule, dpo),
        "orpo": (ORPOModule, {"orpo_lambda": chosen.orpo_lambda}),
    }
    return methods.get(config.training.method, (CausalLMModule, {}))


def prepare(config: Config, module: CausalLMModule, data: DataPipeline, *, resumed: bool = False) -> None:
    """Load the model for a training, and compute what `config` wants to have been computed before.

    Where it is `resumed`, the trainer then reads its weights from a checkpoint.
    """
    if config.training.adapter is not None and not (resumed and config.training.method != "dpo"):
        begin_at(Path(config.training.adapter), module)
    if isinstance(module, DPOModule) and config.preference.precompute_ref_log_probs:
        precompute_reference(module, data)
    module.setup("fit")


def base_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return what every module is told about its base model."""
    return {
        "dtype": model.dtype,
        "max_seq_length": model.max_seq_length,
        "revision": model.revision,
        # The default is Hugging Face's own, which its environment variables may have moved.
        "cache_dir": None if model.cache_dir == ModelConfig().cache_dir else model.cache_dir,
        "trust_remote_code": model.trust_remote_code,
        "verify": model.verify,
    }


def build_data(config: Config, module: CausalLMModule) -> DataPipeline:
    """Return the rows of `config`, checked, encoded and split; raises DataError."""
    data = config.data
    return DataPipeline(
        data.dataset_path,
        module.tokenizer,
        batch_size=config.training.batch_size,
        batch_tokens=config.training.batch_tokens,
        max_shapes=data.max_shapes,
        max_seq_length=config.model.max_seq_length,
        truncation=data.truncation,
        train_split=data.train_split,
        shuffle=data.shuffle,
        seed=data.seed,
        num_workers=data.num_workers,
        validation_path=data.validation_path,
        completion_style=data.completion_style,
        fields=data.fields,
        roles=data.roles,
        max_bad_share=data.max_bad_share,
        vocabulary_size=module.settings.get("vocab_size"),
        cache_dir=data.cache_dir,
        layout=module.batch_layout if data.layout == "auto" else data.layout,
        pairs=config.training.on_preferences,
    )


def build_report(config: Config, data: DataPipeline, module: CausalLMModule, rows: int = 0) -> DataReport:
    """Return what `data` means for a run of `config`, with its first `rows` training rows as text."""
    training = config.training
    return report_on(
        data,
        accumulate=training.gradient_accumulation_steps,
        epochs=training.num_epochs,
        max_steps=training.max_steps,
        examples=[render(row, module.tokenizer) for row in data.train_rows[: rows * data.train_rows.each]],
    )


def build_trainer(config: Config, run_dir: Path, *first: Callback, evaluating: bool = True) -> Trainer:
    """Return the trainer with `first` and then the callbacks that `config` asks for.

    `evaluating` tells whether rows are held out.
    """
    callbacks = [*first, *build_callbacks(config, evaluating=evaluating)]
    allowed = [name.rpartition(".")[2] for name in config.run.allow_changes]
    return trainer_with(config, callbacks, run_dir=run_dir, allow_changes=allowed)


def trainer_with(config: Config, callbacks: Iterable[Callback], **options: Any) -> Trainer:
    """Return the trainer that `config` asks for, but with `callbacks`, and with further `options` of `Trainer`."""
    return Trainer(
        max_epochs=config.training.num_epochs,
        max_steps=config.training.max_steps,
        accumulate=config.training.gradient_accumulation_steps,
        callbacks=callbacks,
        log_every=config.training.logging_steps,
        seed=config.data.seed,
        resume=config.run.resume,
        config=asdict(config),
        **options,
    )


def build_callbacks(config: Config, *, evaluating: bool = True) -> list[Callback]:
    """Return the callbacks that `config` asks for, in their order."""
    training, evaluation = config.training, config.evaluation
    callbacks: list[Callback] = [
        NaNGuard(patience=training.nan_patience, rollback=training.nan_rollback),
        MemoryMonitor(stop_percent=config.run.memory_stop_percent),
        ProgressBar(),
        MetricsLogger(),
    ]
    if training.loss_spike is not None:
        callbacks.append(LossSpike(policy=training.loss_spike))
    if training.max_grad_norm is not None:
        callbacks.append(GradientClipping(max_norm=training.max_grad_norm))
    if evaluating:
        callbacks.append(Evaluation(every=training.eval_steps))
    if evaluating and evaluation.patience is not None:
        callbacks.append(EarlyStopping(monitor="val/loss", patience=evaluation.patience))
    if evaluation.sample_prompts:
        every = None if evaluating else training.eval_steps  # None: at each evaluation
        callbacks.append(SampleGenerator(evaluation.sample_prompts, every=every, max_tokens=evaluation.sample_tokens))
    if training.ema_decay is not None:
        callbacks.append(EMA(training.ema_decay))
    if config.run.tensorboard:
        callbacks.append(TensorBoardLogger())
    if config.run.ledger:
        callbacks.append(Ledger())
    best = "val/loss" if evaluating and training.keep_best else None
    return [*callbacks, ModelCheckpoint(every=training.save_steps, keep_last=training.keep_last, monitor=best)]
