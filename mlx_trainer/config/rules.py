"""What options say about each other: contradictions are refused, unwise settings told, each beginning with its key."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attrs import fields

if TYPE_CHECKING:
    from mlx_trainer.config.schema import Config


def contradictions(config: "Config") -> tuple[str, ...]:
    """Return a sentence for each pair of options that cannot both be meant."""
    return tuple(_contradictions(config))


def unwise(config: "Config") -> tuple[str, ...]:
    """Return a sentence for each setting that is valid and likely to disappoint, with what to set instead."""
    kinds = (_unwise_optimization, _unwise_batches, _unwise_adapters, _unwise_preferences, _unwise_evaluation)
    return tuple(sentence for kind in kinds for sentence in kind(config))


def _contradictions(config: "Config") -> Iterator[str]:
    data = config.data
    if config.training.method == "full" and config.model.dtype == "float16":
        yield (
            "training.method full would lose its small updates in model.dtype float16; "
            "set model.dtype to float32 or bfloat16"
        )
    if config.training.method == "full" and config.training.loraplus_lr_ratio is not None:
        yield "training.loraplus_lr_ratio is for adapters; leave it out, or set training.method to lora"
    if config.training.method == "full" and config.training.adapter is not None:
        yield (
            "training.adapter is an adapter to train on, and training.method full has none; merge it first "
            "(mlx-trainer merge) and name what comes out as model.model_name, or set training.method to lora"
        )
    if config.lora.layers_to_transform is not None and config.training.trainable_layers is not None:
        yield "training.trainable_layers and lora.layers_to_transform both choose blocks; leave one of them out"
    yield from _adalora_contradictions(config)
    if data.layout == "padded" and config.training.recompute not in ("auto", "none"):
        yield (
            f"training.recompute {config.training.recompute} needs unpadded batches; "
            "set data.layout to auto, or training.recompute to auto or none"
        )
    loss = config.preference
    if config.training.method in ("dpo", "orpo") and config.training.neftune_noise_alpha is not None:
        yield "training.neftune_noise_alpha is for training.method lora and full; leave it out"
    if config.training.method == "dpo" and loss.label_smoothing and loss.loss_type != "sigmoid":
        yield (
            f"preference.label_smoothing has no part in preference.loss_type {loss.loss_type}; "
            "set that to sigmoid, or label_smoothing to 0"
        )
    if config.evaluation.patience is not None and not _has_validation(config):
        yield (
            "evaluation.patience needs a held-out loss, and there are no held-out rows: "
            "set data.train_split below 1 or data.validation_path"
        )
    for path in data.validation_paths:
        if path in data.train_paths:
            yield (
                f"data.validation_path has {path!r}, which is in data.dataset_path too: a loss on trained rows says "
                "nothing; leave it out, and data.train_split holds rows back"
            )


def _adalora_contradictions(config: "Config") -> Iterator[str]:
    adalora, lora, training = config.adalora, config.lora, config.training
    if adalora.target_r is None:
        return
    if training.method != "lora":
        yield "adalora.target_r is for training.method lora alone; leave it out, or set that"
    if training.adapter is not None:
        yield "adalora.target_r begins at new adapters of its own; leave it out, or training.adapter"
    if adalora.target_r > lora.rank:
        yield f"adalora.target_r {adalora.target_r} is above lora.rank ({lora.rank}), which ranks begin at"
    if lora.use_dora or lora.init_lora_weights != "default":
        yield "adalora.target_r has a start and layers of its own; leave out lora.use_dora and lora.init_lora_weights"
    if training.ema_decay is not None:
        yield "training.ema_decay would bring back the ranks that adalora.target_r takes away; leave one of them out"
    if training.max_steps is not None and adalora.tinit + adalora.tfinal >= training.max_steps:
        yield (
            f"adalora.tinit {adalora.tinit} and adalora.tfinal {adalora.tfinal} leave none of training.max_steps "
            f"({training.max_steps}) for ranks to fall; lower them"
        )


def _unwise_optimization(config: "Config") -> Iterator[str]:
    training = config.training
    what, highest = {"full": ("full fine-tuning", 1e-4), "dpo": ("DPO", 1e-4)}.get(training.method, ("LoRA", 1e-3))
    if training.learning_rate > highest and training.optimizer != "sgd":
        yield (
            f"training.learning_rate {training.learning_rate:g} is high for {what}; "
            f"{highest / 5:g} is usual, and above {highest:g} runs often diverge"
        )
    if training.max_steps is not None and training.warmup_steps >= training.max_steps:
        yield (
            f"training.warmup_steps {training.warmup_steps} does not fit training.max_steps ({training.max_steps}): "
            f"it will be cut to {training.max_steps // 10}"
        )
    if training.neftune_noise_alpha is not None and training.neftune_noise_alpha > 15:
        yield (
            f"training.neftune_noise_alpha {training.neftune_noise_alpha:g} is above the 15 that its paper tried; "
            "5 is usual"
        )
    if training.loraplus_lr_ratio is not None and not 1 <= training.loraplus_lr_ratio <= 64:
        yield (
            f"training.loraplus_lr_ratio {training.loraplus_lr_ratio:g} lets lora_b learn at "
            f"{training.loraplus_lr_ratio * training.learning_rate:g}; ratios of 4 to 16 are usual"
        )
    if training.max_grad_norm is None:
        yield "training.max_grad_norm is off: one bad batch can undo many steps; 1 is usual"


def _unwise_batches(config: "Config") -> Iterator[str]:
    training, longest = config.training, config.model.max_seq_length
    tokens = training.batch_tokens
    if tokens is None and training.batch_size * training.gradient_accumulation_steps == 1:
        yield (
            "training.batch_size times training.gradient_accumulation_steps is 1: a step of one row is noisy; "
            "8 to 32 rows are usual"
        )
    if tokens is not None and training.batch_size != fields(type(training)).batch_size.default:
        yield f"training.batch_size {training.batch_size} has no effect beside training.batch_tokens; set one of them"
    if tokens is not None and tokens < longest:
        yield (
            f"training.batch_tokens {tokens} is less than model.max_seq_length ({longest}): a row that is longer makes "
            f"a batch of one row and up to {longest} tokens; set at least {longest}, or lower model.max_seq_length"
        )
    if config.data.max_bad_share > 0.5:
        yield (
            f"data.max_bad_share {config.data.max_bad_share:g} trains on what is left of files that are mostly bad; "
            "0.05 is usual"
        )


def _unwise_adapters(config: "Config") -> Iterator[str]:
    if config.training.method == "full":
        return
    lora, adalora = config.lora, config.adalora
    for field in fields(type(adalora)) if adalora.target_r is None else ():
        if getattr(adalora, field.name) != field.default:
            yield f"adalora.{field.name} has no effect without adalora.target_r; set that, or leave it out"
    if lora.rank > 256:
        yield f"lora.rank {lora.rank} is nearly as costly as training.method full; 8 to 64 are usual"
    if lora.scale > 8:
        by, usual = ("the root of ", "a scale of 1 to 4") if lora.use_rslora else ("", "one to two times")
        yield (
            f"lora.alpha {lora.alpha:g} is {lora.scale:g} times {by}lora.rank, which multiplies every update; "
            f"{usual} is usual"
        )
    if lora.dropout > 0 and lora.init_lora_weights != "default":
        yield (
            f"lora.dropout {lora.dropout:g} with lora.init_lora_weights {lora.init_lora_weights} drops inputs of the "
            "weights' largest parts, trained and frozen alike; the authors train without: set lora.dropout to 0"
        )
    if lora.dropout > 0.3:
        yield f"lora.dropout {lora.dropout:g} drops most of what an adapter could learn from; 0 to 0.1 is usual"


def _unwise_preferences(config: "Config") -> Iterator[str]:
    method, preference = config.training.method, config.preference
    for option in fields(type(preference)):
        owner = "orpo" if option.name == "orpo_lambda" else "dpo"
        if owner != method and getattr(preference, option.name) != option.default:
            yield f"preference.{option.name} has no effect with training.method {method}; it belongs to {owner}"


def _unwise_evaluation(config: "Config") -> Iterator[str]:
    training, data = config.training, config.data
    if not _has_validation(config):
        yield "data.train_split 1 holds no rows back: there is no evaluation, and over-fitting goes unseen"
    if training.max_steps is not None and training.save_steps > training.max_steps:
        yield (
            f"training.save_steps {training.save_steps} is beyond training.max_steps ({training.max_steps}): "
            "only the end of the run is saved"
        )
    if data.validation_path is None and data.train_split < 0.5:
        yield f"data.train_split {data.train_split:g} leaves most rows untrained; 0.9 is usual"


def _has_validation(config: "Config") -> bool:
    return config.data.validation_path is not None or config.data.train_split < 1
