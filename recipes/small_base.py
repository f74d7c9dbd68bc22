"""A small Mistral from nothing, for the quick start: a tokenizer, fresh weights, and a training of all of them.

The result is a folder in Hugging Face layout, like one from the Hub, which mlx-lm and transformers open too.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from attrs import frozen
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten

from mlx_trainer import CausalLMModule, DataPipeline, GradientClipping, NaNGuard, ProgressBar, Trainer
from mlx_trainer.optim import build_optimizer

CONTROL_TOKENS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
"""Mistral v0.3's, at their ids 0 to 9."""

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
  {%- if message.role == 'user' and loop.index0 is even %}
    {{- '[INST] ' + message.content + '[/INST]' }}
  {%- elif message.role == 'assistant' and loop.index0 is odd %}
    {{- ' ' + message.content + eos_token }}
  {%- else %}
    {{- raise_exception('Messages must alternate: user, assistant, user, …') }}
  {%- endif %}
{%- endfor %}"""


@frozen
class Size:
    """How large the base is, and how long it is trained."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    row_tokens: int
    """Pages are cut to this many tokens."""
    batch_size: int
    steps: int
    learning_rate: float

    def config(self) -> dict[str, Any]:
        """The model's config.json. The MLP is narrow: on a CPU its activation costs more than its matrix products."""
        return {
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000.0,  # rows are short
            "sliding_window": None,
            "max_position_embeddings": 512,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


class Pretraining(CausalLMModule):
    """All weights from scratch, in few steps: a shorter memory for Adam, and a rate that does not end at zero."""

    def __init__(self, folder: Path, size: Size) -> None:
        super().__init__(folder, lora=None, dtype="float32", max_seq_length=size.row_tokens)
        self.size = size

    def configure_optimizer(self, total_steps: int | None) -> Optimizer:
        """AdamW with a cosine down to a tenth of the rate."""
        return build_optimizer(
            "adamw",
            self.size.learning_rate,
            schedule="cosine",
            total_steps=total_steps,
            warmup_steps=self.size.steps // 20,
            betas=(0.9, 0.95),
            minimum_ratio=0.1,
        )


def train_base(folder: Path, texts: list[str], size: Size, work: Path, log_every: int = 100) -> None:
    """Fill `folder` with a model that was trained on `texts`; `work` is a folder for its training data."""
    write_tokenizer(folder, texts, size.vocabulary)
    write_model(folder, size)
    rows = write_jsonl(work / "pages.jsonl", ({"text": text} for text in texts))
    base = Pretraining(folder, size)
    data = DataPipeline(
        rows, base.tokenizer, batch_size=size.batch_size, max_seq_length=size.row_tokens, train_split=1.0
    )
    callbacks = [GradientClipping(max_norm=1.0), NaNGuard(), ProgressBar()]
    Trainer(max_steps=size.steps, callbacks=callbacks, log_every=log_every).fit(base, data)
    save_weights(folder, base.model.parameters())


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Train a byte-level BPE on `texts` and write it as a Hugging Face tokenizer with Mistral's chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_model(folder: Path, size: Size, seed: int = 0) -> None:
    """Write config.json and freshly drawn weights."""
    from mlx_lm.models.llama import Model, ModelArgs  # mlx-lm's Mistral is its Llama

    config = size.config()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    mx.random.seed(seed)
    save_weights(folder, Model(ModelArgs.from_dict(config)).parameters())


def save_weights(folder: Path, parameters: Any) -> None:
    """Write model.safetensors."""
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(parameters)), metadata={"format": "mlx"})


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
