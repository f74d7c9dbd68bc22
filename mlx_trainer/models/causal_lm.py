"""`CausalLMModule`: any language model that mlx-lm loads, as something the trainer can train."""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import adapters, generation, loading, provenance, source
from mlx_trainer.models.arguments import check_dtype, check_method, check_recompute, told
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.graph_memory import padded_peak
from mlx_trainer.models.head import head_loss
from mlx_trainer.models.hf_config import ModelSettings, read_config, vocabulary_size
from mlx_trainer.models.last_layers import on_last, unfreeze_last
from mlx_trainer.models.lora import inject_lora
from mlx_trainer.models.loss import next_token_loss
from mlx_trainer.models.memory import MemoryEstimate
from mlx_trainer.models.neftune import noisy_embeddings
from mlx_trainer.models.parameters import ParameterStats, parameter_stats
from mlx_trainer.models.recomputation import Policy
from mlx_trainer.models.step_memory import StepMemory, step_estimate
from mlx_trainer.models.token_ids import check_ids, check_tokenizer
from mlx_trainer.models.unpadded import hidden_states, takes_unpadded
from mlx_trainer.module import LossOutput, TrainerModule
from mlx_trainer.optim import build_optimizer

log = logging.getLogger("mlx_trainer.models")

WORTH_HALVING = 1 << 16
"""From so many numbers in its hidden states on, halves of a batch side by side beat the whole; 2 to 16 layers alike."""


class CausalLMModule(TrainerModule):
    """A causal language model with LoRA adapters (`lora=None`: all weights train), its tokenizer, loss and generation.

    `trainable_layers` lets the last so many blocks train alone, in full or by adapters; `loraplus_lr_ratio` and
    `neftune_noise_alpha` are told of in `optim.LoRAPlus` and `neftune.py`.

    Cheap to construct: the tokenizer is loaded at first use, the model at first use or `setup`. Each of `load_model`,
    `inject_lora`, `forward`, `training_loss` and `generate` can be overridden alone. A batch has `input_ids`,
    `attention_mask` and `labels`, all (rows, length), padded on the right, and `metadata` on the host.

    `verify` reads all of a Hub model's files before they are loaded and raises ModelError where one is not what the
    Hub published, at 1 to 2 GB/s.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike[str],
        *,
        lora: LoRAConfig | None = LoRAConfig(),  # noqa: B008 - frozen
        dtype: str = "float16",
        max_seq_length: int = 2048,
        learning_rate: float = 2e-4,
        optimizer: str = "adamw",
        schedule: str = "cosine",
        warmup_steps: int = 100,
        weight_decay: float = 0.01,
        loraplus_lr_ratio: float | None = None,
        neftune_noise_alpha: float | None = None,
        trainable_layers: int | None = None,
        recompute: Policy | Literal["auto"] = "auto",
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        trust_remote_code: bool = False,
        verify: bool = False,
        seed: int = 42,
    ) -> None:
        check_dtype(dtype, full=lora is None)
        check_recompute(recompute)
        check_method(lora, loraplus_lr_ratio, trainable_layers)
        self.name = os.fspath(model_name_or_path)
        self.lora = lora
        self.dtype = dtype
        self.max_seq_length = max_seq_length
        self.recompute = recompute
        self.revision = revision
        self.cache_dir = cache_dir
        self.trust_remote_code, self.verify = trust_remote_code, verify
        self.seed = seed
        self.neftune_noise_alpha, self.trainable_layers = neftune_noise_alpha, trainable_layers
        self.artifact = "model" if lora is None and trainable_layers is None else "adapter"
        self._optimization = {
            "name": optimizer,
            "learning_rate": learning_rate,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "loraplus_lr_ratio": loraplus_lr_ratio,
        }
        self._model: nn.Module | None = None
        self._commit: str | None = None
        self._memory = StepMemory()

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The model with its adapters, loaded at first use."""
        if self._model is None:
            base = self.load_model()
            self._model = unfreeze_last(base, self.trainable_layers) if self.lora is None else self.inject_lora(base)
            log.info("%s: %s", self.name, str(self.parameter_stats).rpartition("\n")[2])
        return self._model

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer, loaded without the model; raises ModelError where it is another model's."""
        directory = self._directory(source.TOKENIZER_FILES)
        tokenizer = loading.load_tokenizer(directory, trust_remote_code=self.trust_remote_code)
        if (directory / "config.json").exists() and (size := vocabulary_size(self.settings)) is not None:
            check_tokenizer(tokenizer, size)
        return tokenizer

    @cached_property
    def settings(self) -> ModelSettings:
        """The base model's config.json."""
        return read_config(self._directory(source.TOKENIZER_FILES))

    def base_facts(self) -> dict[str, Any]:
        """Return which base model this is: its name, the Hub's commit, and sizes and sampled digests of its weights."""
        return {"name": self.name, **provenance.base_facts(self._directory(source.MODEL_FILES))}

    @property
    def batch_layout(self) -> Literal["padded", "unpadded"]:
        """ "unpadded" where the model can take it, and no subclass has a forward or a loss of its own."""
        kind, own = type(self), CausalLMModule
        replaced = kind.forward is not own.forward or kind.training_loss is not own.training_loss
        return "unpadded" if takes_unpadded(self.settings) and not replaced else "padded"

    @property
    def parameter_stats(self) -> ParameterStats:
        """How many parameters there are and which train; loads the model."""
        return parameter_stats(self.model)

    def setup(self, stage: str) -> None:
        """Load the model where that has not happened; dropout is on for "fit" alone."""
        self._memory.begin()
        self.model.train(stage == "fit")

    def load_model(self) -> nn.Module:
        """Return the base model as `dtype`; downloads it where it is no local folder and not in the cache."""
        directory = self._directory(source.MODEL_FILES)
        if self.verify:
            provenance.verify(directory)
        model = loading.load_model(directory, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        loading.tell_lengths(model, self.settings, self.name, self.max_seq_length)
        return model

    def inject_lora(self, model: nn.Module) -> nn.Module:
        """Freeze `model` and put adapters on the layers that `lora.target_modules` name."""
        return inject_lora(model, on_last(model, self.lora or LoRAConfig(), self.trainable_layers), seed=self.seed)

    def forward(self, batch: Any) -> mx.array:
        """Return the logits, (rows, length, vocabulary), of a padded batch.

        No mask is needed: attention is causal and padding stands on the right, so no real token sees it.
        """
        logits: mx.array = self.model(batch.input_ids)
        return logits

    def training_loss(self, batch: Any) -> LossOutput:
        """Return the summed next-token loss; in eval mode with `token_accuracy`, whose argmax training is spared.

        An unpadded batch takes a forward of its own (`unpadded.py`), which `takes_unpadded` allows, and no `forward`.
        Raises ModelError where parts of a padded batch's forward are to be run again.
        """
        with noisy_embeddings(self.model, batch, self.neftune_noise_alpha):
            policy = self.recomputation(batch)
            if hasattr(batch, "cells"):
                states = hidden_states(self.model, batch, policy)
                return head_loss(self.model, states, batch, self.settings["vocab_size"])
            return next_token_loss(self.forward(batch), batch.labels, accuracy=not self.model.training)

    def parts(self, batch: Any) -> Sequence[Any]:
        """Return the halves of a large batch that has some; `batch` alone where a subclass has a loss of its own."""
        if type(self).training_loss is not CausalLMModule.training_loss or not hasattr(batch, "halves"):
            return [batch]
        numbers = batch.input_ids.size * self.settings.get("hidden_size", 0)
        return batch.halves() if numbers >= WORTH_HALVING else [batch]

    def recomputation(self, batch: Any) -> Policy:
        """What the gradient of unpadded batches of this shape runs again: `recompute`, for "auto" as little as fits.

        The memory that is needed is told, and MLX's is bounded by it (`StepMemory.bound`). Of padded batches nothing
        is run again; raises ModelError where `recompute` asks for it.
        """
        if not self.model.training:
            return "none"
        if hasattr(batch, "cells"):
            step = self._estimate(batch)
            self._memory.bound(step)
            return step.policy
        if self.recompute not in ("auto", "none"):
            raise ModelError(f'recompute="{self.recompute}" needs unpadded batches; use "auto" or "none".')
        return "none"

    def check_batch(self, batch: Any) -> None:
        """Raise ModelError, naming the row, where a token id is beyond the vocabulary, or rejected answers are rows."""
        if getattr(batch.metadata, "pairs", 0):
            raise ModelError(f"{type(self).__name__} would learn the rejected answers of pairs too; use DPO or ORPO.")
        self.check_ids(batch)

    def check_ids(self, batch: Any) -> None:
        """Raise ModelError, naming the row, where a token id is beyond the model's vocabulary."""
        if (size := vocabulary_size(self.settings)) is not None:
            check_ids(batch, size)

    def memory_estimate(self, batch: Any) -> int | None:
        """Return what a step needs as it would run, in bytes; None for padded batches where `padded_peak` has none."""
        optimizer = self.configure_optimizer(1_000_000)
        return self._estimate(batch).peak if hasattr(batch, "cells") else padded_peak(self, batch, optimizer)

    def predict(self, batch: Any) -> mx.array:
        """Return the logits of a batch; raises ModelError for a token id beyond the vocabulary."""
        self.check_batch(batch)
        return self.forward(batch)

    def configure_optimizer(self, total_steps: int | None) -> Optimizer:
        """Return the optimizer that the constructor's arguments describe."""
        return build_optimizer(**self._optimization, total_steps=total_steps)  # type: ignore[arg-type]

    def fingerprint(self) -> Mapping[str, Any]:
        """Return method, adapters, type and learning rate; the base model is told by its parameters themselves."""
        lora = {} if self.lora is None else told(self.lora)
        names = ("learning_rate", "schedule", "warmup_steps", "weight_decay", "loraplus_lr_ratio")
        optimization = {name: self._optimization[name] for name in names}
        optimization |= {name: getattr(self, name) for name in ("neftune_noise_alpha", "trainable_layers")}
        return {"method": "full" if self.lora is None else "lora", "dtype": self.dtype, **lora, **optimization}

    def count(self, batch: Any) -> Mapping[str, int]:
        """Return the rows, real tokens and trained tokens of a batch, and the positions computed for them.

        Where rows share a prefix, also how many of the tokens were not computed again.
        """
        data = batch.metadata
        counts = {
            "rows": len(data.rows),
            "tokens": data.tokens,
            "trained_tokens": data.trained_tokens,
            "positions": data.positions,
        }
        return counts | ({"shared_tokens": data.shared_tokens} if data.shared_tokens else {})

    def generate(self, prompts: Sequence[generation.Prompt], **options: Any) -> list[str]:
        """Return the answer to each prompt: a text, a list of messages, or a row with `messages` and `tools`.

        Prompts are written as training rows are (`prompts.py`). `options` are those of `generation.Options`:
        `max_tokens` (256), `temperature` (0), `top_p`, `min_p`, `repetition_penalty`, `timeout_s`, `stop` texts, and
        `system`, a text before each prompt. Tokens are drawn from `seed`, by default the module's, or from one for each
        prompt, so that no answer depends on the others; `batch_size` (8) are answered at once. A prompt and its answer
        hold at most `max_seq_length` tokens. The model's mode and MLX's random state are afterwards what they were.
        Raises ModelError.
        """
        return list(self.answers(prompts, **options))

    def answers(
        self,
        prompts: Sequence[generation.Prompt],
        *,
        seed: int | Sequence[int] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> Iterator[str]:
        """Yield the answers of `generate`, a batch as soon as it is there; a wrong prompt raises at once."""
        asked = generation.Options(**options)
        return self._writer().answers(prompts, asked, self.seed if seed is None else seed, batch_size)

    def stream(self, prompt: generation.Prompt, *, seed: int | None = None, **options: Any) -> generation.Pieces:
        """Yield the answer of `generate`, whose options these are, in pieces of whole characters; close it to end it.

        A wrong prompt or option raises at once. Between two pieces the model is in its own mode; several streams can be
        read in turns.
        """
        return self._writer().stream(prompt, generation.Options(**options), self.seed if seed is None else seed)

    def save(self, directory: Path) -> None:
        """Write what trains into `directory`, in mlx-lm's adapter layout."""
        lora = None if self.lora is None else on_last(self.model, self.lora, self.trainable_layers)
        adapters.save_adapters(self.model, directory, base=self.name, lora=lora)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; raises ModelError, and changes nothing, where it does not fit."""
        adapters.load_adapters(self.model, directory)

    def _writer(self) -> generation.Writer:
        return generation.Writer(
            model=self.model,
            tokenizer=self.tokenizer,
            stop_ids=generation.stop_ids(self.tokenizer, self.settings, self._directory(source.TOKENIZER_FILES)),
            vocabulary=vocabulary_size(self.settings),
            longest=self.max_seq_length,
        )

    def _estimate(self, batch: Any) -> MemoryEstimate:
        return step_estimate(self.model, batch, self.configure_optimizer(1_000_000), self.recompute)

    def _directory(self, files: Sequence[str]) -> Path:
        revision = self._commit or self.revision
        found = source.resolve(self.name, revision=revision, cache_dir=self.cache_dir, files=files)
        if not Path(self.name).expanduser().is_dir():
            self._commit = source.commit_of(found)  # tokenizer and weights are of one commit, should the branch move
        return found
