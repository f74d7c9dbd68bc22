"""A two-layer Mistral and its tokenizer in Hugging Face layout, written in milliseconds, for tests of real folders."""

import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Matrix = np.ndarray[Any, np.dtype[np.float32]]

#: Mistral v0.3's control tokens; a token's position is its id.
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
VOCABULARY = 384
GROUP_SIZE = 32

#: Renders text chats as Mistral v0.3's own template does: system text only in a last user message, answers stripped.
CHAT_TEMPLATE = """\
{%- set offset = 1 if messages and messages[0].role == 'system' else 0 -%}
{{- bos_token -}}
{%- for turn in messages[offset:] -%}
  {%- if turn.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('After an optional system message the roles must alternate user/assistant.') -}}
  {%- endif -%}
  {%- if turn.role == 'assistant' -%}
    {{- ' ' ~ (turn.content | trim) ~ eos_token -}}
  {%- elif offset and loop.last -%}
    {{- '[INST] ' ~ messages[0].content ~ '\n\n' ~ turn.content ~ '[/INST]' -}}
  {%- else -%}
    {{- '[INST] ' ~ turn.content ~ '[/INST]' -}}
  {%- endif -%}
{%- endfor -%}
"""

CORPUS = (
    "The quick brown fox jumps over the lazy dog while the other dogs sleep.",
    "What does this function do? It returns the sum of two numbers and their difference.",
    "A model learns from examples; an adapter learns from a few of them.",
    "Answer in one sentence: where do the rivers of the north meet the sea?",
)


def tiny_mistral(
    directory: Path,
    *,
    transformers5: bool = False,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    tied: bool = False,
    rope_theta: float = 1_000_000.0,
    bits: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """Write config.json, model.safetensors and the tokenizer into `directory` and return it.

    `transformers5=True` lets transformers itself write config.json (rope base under `rope_parameters`);
    `bits` packs the linear layers and the embedding as MLX does (groups of 32).
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config(hidden_size=hidden_size, layers=layers, tied=tied, rope_theta=rope_theta)
    write_config(directory, config, transformers5=transformers5, bits=bits)
    weights = {name: mx.array(value).astype(dtype) for name, value in tiny_weights(config, seed).items()}
    mx.save_safetensors(
        str(directory / "model.safetensors"), pack(weights, bits) if bits else weights, metadata={"format": "mlx"}
    )
    write_tokenizer(directory)
    return directory


def tiny_config(*, hidden_size: int, layers: int, tied: bool, rope_theta: float) -> dict[str, Any]:
    """Return a Mistral configuration as transformers 4 wrote it: `rope_theta` at the top level."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_theta": rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_config(directory: Path, config: dict[str, Any], *, transformers5: bool, bits: int | None) -> None:
    """Write config.json, by hand or through transformers, with MLX's quantization keys where `bits` is given."""
    if transformers5:
        from transformers import MistralConfig

        MistralConfig(**config).save_pretrained(directory)
        config = json.loads((directory / "config.json").read_text())
    if bits:
        config["quantization"] = config["quantization_config"] = {"group_size": GROUP_SIZE, "bits": bits}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def tiny_weights(config: dict[str, Any], seed: int) -> dict[str, Matrix]:
    """Return float32 weights under Hugging Face's names, drawn without touching any global random state."""
    generator = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * config["head_dim"]

    def matrix(rows: int, columns: int) -> Matrix:
        return np.asarray(generator.normal(0.0, columns**-0.5, (rows, columns)), np.float32)

    def gain() -> Matrix:
        return np.asarray(generator.normal(1.0, 0.1, hidden), np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, hidden), "model.norm.weight": gain()}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        weights |= {
            f"{at}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{at}.self_attn.k_proj.weight": matrix(keys, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(keys, hidden),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{at}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{at}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{at}.mlp.down_proj.weight": matrix(hidden, inner),
            f"{at}.input_layernorm.weight": gain(),
            f"{at}.post_attention_layernorm.weight": gain(),
        }
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(VOCABULARY, hidden)
    return weights


def pack(weights: dict[str, mx.array], bits: int) -> dict[str, mx.array]:
    """Return `weights` with every matrix packed to `bits` bits as `.weight`, `.scales` and `.biases`."""
    packed: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if weight.ndim == 2:
            parts = mx.quantize(weight, group_size=GROUP_SIZE, bits=bits)
            packed |= dict(zip((name, f"{name[:-6]}scales", f"{name[:-6]}biases"), parts, strict=True))
        else:
            packed[name] = weight
    return packed


def write_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE, Mistral's control tokens and chat template."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer.json").write_text(tokenizer_json())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


@functools.cache
def tokenizer_json() -> str:
    """Train the byte-level BPE on a few sentences and return it as JSON; encoding adds `<s>` as Mistral's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            min_frequency=1,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer.to_str()
