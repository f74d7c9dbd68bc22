"""The sections of a configuration: every option, its default, its valid range and its help text."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import field, frozen

from mlx_trainer.config.error import ConfigError
from mlx_trainer.config.option import option
from mlx_trainer.config.patterns import by_pattern, check_expressions
from mlx_trainer.config.rules import contradictions
from mlx_trainer.config.valid import Filled, NotEmpty, Range

COUNT = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
SHARE = Range(at_least=0, at_most=1)
NOT_EMPTY = NotEmpty()


@frozen
class ModelConfig:
    """Which base model, and how it is held in memory."""

    model_name: str = option(
        "Hub name or local folder of the base model", "mistralai/Mistral-7B-Instruct-v0.3", NOT_EMPTY
    )
    cache_dir: str = option("Hugging Face cache that downloads go to", "~/.cache/huggingface", NOT_EMPTY)
    revision: str | None = option("Branch, tag or commit on the Hub", None, NOT_EMPTY)
    dtype: Literal["float16", "bfloat16", "float32"] = option("Type the base weights are held in", "float16")
    max_seq_length: int = option(
        "Longest row in tokens; data.truncation says what becomes of longer ones", 2048, Range(at_least=8)
    )
    trust_remote_code: bool = option("Run Python code that comes with the model", False)
    verify: bool = option("Compare all of a Hub model's files with their published digests", False)


@frozen
class LoRAConfig:
    """Low-rank adapters: `y = W x + scale · B A x` on each target layer (https://arxiv.org/abs/2106.09685).

    The names are PEFT's but for the first three, `docs/adapters.md` has the formula and the source of each.
    """

    rank: int = option("Rank of the adapters", 16, COUNT)
    alpha: float = option("The adapters' output is scaled by alpha / rank", 32.0, Range(above=0))
    dropout: float = option("Chance that an adapter input is dropped in training", 0.05, Range(at_least=0, below=1))
    target_modules: Sequence[str] | str = option(
        "Layers that get an adapter: names; all-linear; or a regular expression for the whole path",
        ("q_proj", "v_proj"),
        NOT_EMPTY,
    )
    layers_to_transform: Sequence[int] | None = option(
        "Numbers of the blocks that get adapters, from 0; null: all", None, NotEmpty(NOT_NEGATIVE, "numbers")
    )
    use_rslora: bool = option("Scale by alpha / sqrt(rank) instead (rsLoRA)", False)
    use_dora: bool = option("Train the length of each row of the weights apart from its direction (DoRA)", False)
    init_lora_weights: Literal["default", "pissa", "olora"] = option(
        "Where the adapters start: at random, or at the weights' largest parts (PiSSA) or first columns (OLoRA)",
        "default",
    )
    rank_pattern: Mapping[str, int] = option("Ranks of layers by name or regular expression", {}, Filled(COUNT))
    alpha_pattern: Mapping[str, float] = option(
        "Alphas of layers by name or regular expression", {}, Filled(Range(above=0))
    )

    def __attrs_post_init__(self) -> None:
        """Refuse what is no regular expression where one is expected."""
        whole = [self.target_modules] if isinstance(self.target_modules, str) else []
        check_expressions(
            {"target_modules": whole, "rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        )

    @property
    def scale(self) -> float:
        """The factor on an adapter's output where no pattern says otherwise."""
        return self._scale(self.rank, self.alpha)

    def rank_of(self, path: str) -> int:
        """The rank of the adapter on the layer at the dotted `path`."""
        return by_pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """The factor on the output of the adapter at `path`: alpha / rank, or alpha / √rank, of that layer."""
        return self._scale(self.rank_of(path), by_pattern(self.alpha_pattern, path, self.alpha))

    def _scale(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


@frozen
class AdaLoRAConfig:
    """Adapters whose ranks fall from `lora.rank` to `target_r` on average (https://arxiv.org/abs/2303.10512).

    The names are PEFT's.
    """

    target_r: int | None = option("Mean rank that is left at the end (AdaLoRA); null: lora.rank for all", None, COUNT)
    tinit: int = option("Steps before ranks begin to fall", 0, NOT_NEGATIVE)
    tfinal: int = option("Steps at the end in which the ranks left are final", 0, NOT_NEGATIVE)
    deltaT: int = option("Steps from one allocation of ranks to the next", 1, COUNT)
    beta1: float = option("Share of the old in the smoothed importance", 0.85, Range(above=0, below=1))
    beta2: float = option("Share of the old in how much importance varies", 0.85, Range(above=0, below=1))
    orth_reg_weight: float = option("Weight in the loss of how far P and Q are from orthogonal", 0.5, NOT_NEGATIVE)


@frozen
class TrainingConfig:
    """The optimization, and how often a run saves, evaluates and logs (in optimizer steps)."""

    method: Literal["lora", "full", "dpo", "orpo"] = option(
        "Train LoRA adapters, or all weights; dpo and orpo train LoRA adapters on preferences", "lora"
    )
    adapter: str | None = option(
        "Folder of the adapter that training begins at, mlx-lm's or PEFT's; null: a new one", None, NOT_EMPTY
    )
    batch_size: int = option("Rows per micro-batch", 2, COUNT)
    batch_tokens: int | None = option("Tokens per micro-batch instead, padding included", None, COUNT)
    gradient_accumulation_steps: int = option("Micro-batches per optimizer step", 4, COUNT)
    num_epochs: int = option("Passes over the training rows", 3, COUNT)
    max_steps: int | None = option("Stop after this many steps, even within an epoch", None, COUNT)
    optimizer: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = option("Optimizer by name", "adamw")
    schedule: Literal["cosine", "linear", "constant"] = option("Learning rate after the warm-up", "cosine")
    learning_rate: float = option("Highest learning rate", 2e-4, Range(above=0, at_most=1))
    warmup_steps: int = option("Steps over which the learning rate rises to its highest", 100, NOT_NEGATIVE)
    weight_decay: float = option("Share of the weights taken off, times the learning rate", 0.01, SHARE)
    loraplus_lr_ratio: float | None = option(
        "lora_b learns at this many times learning_rate (LoRA+); null: at the same", None, Range(above=0)
    )
    neftune_noise_alpha: float | None = option(
        "Noise on the embeddings, at most this over √(a row's tokens · width) (NEFTune); null: none",
        None,
        Range(above=0),
    )
    ema_decay: float | None = option(
        "Evaluate, and end with, an average of the parameters that keeps this share a step; null: none",
        None,
        Range(above=0, below=1),
    )
    trainable_layers: int | None = option("Only the last so many blocks train, or get adapters; null: all", None, COUNT)
    max_grad_norm: float | None = option("Gradients are scaled down to this global norm", 1.0, Range(above=0))
    nan_patience: int = option("Steps in a row whose numbers are not finite, after which the run ends", 3, COUNT)
    nan_rollback: bool = option("After these, go back to the newest checkpoint and on with other rows", False)
    loss_spike: Literal["warn", "skip", "rollback"] | None = option(
        "What to do about a loss 6 sigma above the last 128: tell, skip the step, or go back; null: nothing", None
    )
    recompute: Literal["auto", "none", "attention", "selective", "mlp", "block"] = option(
        "What the backward pass computes again to save memory; auto: as little as fits", "auto"
    )
    save_steps: int = option("Steps between checkpoints", 100, COUNT)
    keep_last: int = option("Newest checkpoints that stay on disk", 3, COUNT)
    keep_best: bool = option("Save each lowest held-out loss, and keep the lowest of all", True)
    eval_steps: int = option("Steps between evaluations", 50, COUNT)
    logging_steps: int = option("Steps between log lines", 10, COUNT)

    @property
    def on_preferences(self) -> bool:
        """Whether the rows are pairs of answers, of which one is preferred."""
        return self.method in ("dpo", "orpo")


@frozen
class PreferenceConfig:
    """What counts in training on preferences, by TRL's names; `training.method` says which of it is used."""

    beta: float = option("DPO: how much a change of log-probability counts", 0.1, Range(above=0))
    loss_type: Literal["sigmoid", "ipo", "hinge"] = option("DPO: its own loss, or that of IPO or SLiC", "sigmoid")
    label_smoothing: float = option(
        "DPO with sigmoid: share of the pairs that is taken to be swapped", 0.0, Range(at_least=0, below=0.5)
    )
    precompute_ref_log_probs: bool = option(
        "DPO: compute the reference once before training, and not in each step: quicker with several epochs", False
    )
    orpo_lambda: float = option("ORPO: weight of the odds ratio beside the chosen answers' loss", 0.1, NOT_NEGATIVE)


@frozen
class DataConfig:
    """The rows, what becomes of them, and how they are split and ordered."""

    dataset_path: str | Sequence[str] | Mapping[str, float] = option(
        "JSONL file, folder of train.jsonl and valid.jsonl, pattern or hf:owner/name; or several, also with weights",
        valid=NotEmpty(Range(above=0)),
    )
    validation_path: str | Sequence[str] | None = option(
        "JSONL file of held-out rows, or several; without it the dataset is split", None, NOT_EMPTY
    )
    fields: Mapping[str, str] = option("What the rows call the keys of their format", {}, Filled())
    roles: Mapping[str, str] = option("What the rows' roles mean: system, user, assistant, …", {}, Filled())
    completion_style: Literal["chat", "raw"] = option("Make a chat of prompt and completion, or join them", "chat")
    truncation: Literal["truncate", "split", "drop", "error"] = option(
        "Rows that are too long are cut, made several (texts), left out, or refused", "truncate"
    )
    max_bad_share: float = option("More bad rows than this share of a source are refused", 0.05, SHARE)
    layout: Literal["auto", "padded", "unpadded"] = option("Batches: padded, unpadded, or as suits the model", "auto")
    max_shapes: int = option("Most distinct shapes of batches; each is compiled", 16, COUNT)
    train_split: float = option("Share of the rows that is trained on", 0.9, Range(above=0, at_most=1))
    shuffle: bool = option("Draw a new row order each epoch", True)
    seed: int = option("Seed of the split, the order, dropout and new weights", 42, NOT_NEGATIVE)
    num_workers: int = option("Threads that prepare batches ahead; 0 prepares them in the loop", 0, NOT_NEGATIVE)
    cache_dir: str | None = option("Folder of the encoded rows; by default in the user's cache", None, NOT_EMPTY)

    @property
    def train_paths(self) -> tuple[str, ...]:
        """The paths of `dataset_path`, however they are given, without weights."""
        return (self.dataset_path,) if isinstance(self.dataset_path, str) else tuple(self.dataset_path)

    @property
    def validation_paths(self) -> tuple[str, ...]:
        """The paths of `validation_path`, perhaps none."""
        return (self.validation_path,) if isinstance(self.validation_path, str) else tuple(self.validation_path or ())


@frozen
class EvaluationConfig:
    """What is measured and shown beside the held-out loss."""

    sample_prompts: Sequence[str] = option("Prompts answered at every evaluation", ())
    sample_tokens: int = option("Most tokens of each answer", 100, COUNT)
    patience: int | None = option("Stop after this many evaluations without a lower loss", None, COUNT)


@frozen
class RunConfig:
    """Where a run is written, and what it continues."""

    directory: str | None = option("Run folder; by default runs/ and the dataset's name", None, NOT_EMPTY)
    resume: str | None = option(
        "auto (the newest checkpoint of the run folder) or a checkpoint's folder", None, NOT_EMPTY
    )
    memory_stop_percent: float | None = option(
        "Stop in order, with a checkpoint, where this share of the memory is taken", None, Range(above=0, at_most=100)
    )
    allow_changes: Sequence[str] = option("What a resumed run may have changed, such as learning_rate; or all", ())
    tensorboard: bool = option("Write TensorBoard files", True)
    ledger: bool = option("Write which rows each step was trained on, to ledger.jsonl", False)


@frozen
class Config:
    """A whole configuration; only `data` has no default, because `data.dataset_path` has none."""

    model: ModelConfig = field(factory=ModelConfig)
    lora: LoRAConfig = field(factory=LoRAConfig)
    adalora: AdaLoRAConfig = field(factory=AdaLoRAConfig)
    training: TrainingConfig = field(factory=TrainingConfig)
    preference: PreferenceConfig = field(factory=PreferenceConfig)
    data: DataConfig = field(kw_only=True)
    evaluation: EvaluationConfig = field(factory=EvaluationConfig)
    run: RunConfig = field(factory=RunConfig)

    def __attrs_post_init__(self) -> None:
        """Refuse sections that contradict each other."""
        if found := contradictions(self):
            raise ConfigError("\n".join(found))
