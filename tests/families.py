"""Tiny models of many families: their configuration as transformers writes it, and folders in Hugging Face layout."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tests.tiny import VOCABULARY, write_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 4
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 20_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    **EXPERTS,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.5,
}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 200_000.0},
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

#: The class of the configuration in transformers, and what differs from `SIZES`: each can be misread in its own way.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None, "rope_theta": 1e6}),
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "rope_theta": 1e6}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3TextConfig", GEMMA3),
    "phi3": ("Phi3Config", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 1e6}),
    "qwen2_moe": ("Qwen2MoeConfig", {"num_experts": 4, "shared_expert_intermediate_size": 48, **EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "head_dim": 16, **EXPERTS}),
    "olmo2": ("Olmo2Config", {"rope_theta": 5e5}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "num_hidden_layers": 4}),
    "granite": ("GraniteConfig", GRANITE),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW, "num_hidden_layers": 4, "logit_scale": 1.0}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2, "rope_theta": 2e6}),
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", LATENT),
    "ministral3": ("Ministral3Config", {"head_dim": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "stablelm": ("StableLmConfig", {}),
}
PICTURES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = {"image_size": 28, "patch_size": 14}
#: Models of texts and pictures, of which mlx-lm reads the half that knows texts.
OF_PICTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mistral3": (
        "Mistral3Config",
        {
            "image_token_index": VOCABULARY - 1,
            "text_config": {**SIZES, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
            "vision_config": {**PICTURES, **PIXELS, "model_type": "pixtral", "head_dim": 16},
        },
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "image_token_index": VOCABULARY - 1,
            "text_config": {**SIZES, **GEMMA3, "model_type": "gemma3_text"},
            "vision_config": {**PICTURES, **PIXELS, "model_type": "siglip_vision_model"},
        },
    ),
}


def tiny_settings(family: str) -> Any:
    """Return the configuration of `family`, an object of transformers; torch is not needed for it."""
    import transformers

    kind, own = FAMILIES[family] if family in FAMILIES else OF_PICTURES[family]
    return getattr(transformers, kind)(**(own if "text_config" in own else {**SIZES, **own}))


def tiny_family(directory: Path, family: str) -> Path:
    """Write a model of `family` as mlx-lm converts them, with its tokenizer, and return `directory`; no torch."""
    from mlx_trainer.models.hf_config import normalised

    tiny_settings(family).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    names = () if config.get("tie_word_embeddings") else ("lm_head.weight",)
    config = normalised(config, names)
    (directory / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(random_model(config).parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_tokenizer(directory)
    return directory


def random_model(config: Mapping[str, Any]) -> nn.Module:
    """Return mlx-lm's model of `config` with random weights, its gains and biases too."""
    from mlx_lm.utils import MODEL_REMAPPING

    kind = config["model_type"]
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    model.apply(lambda value: value + 0.1 * mx.random.normal(value.shape) if value.ndim == 1 else value)
    return model


def torch_family(directory: Path, family: str) -> Any:
    """Let transformers write a random model of `family` into `directory`, and return it; needs torch."""
    import torch
    import transformers

    pictured = family in OF_PICTURES
    kind = transformers.AutoModelForImageTextToText if pictured else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(tiny_settings(family)).float().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.1 if value.ndim == 1 else value.shape[-1] ** -0.5))
    model.save_pretrained(directory)
    return model
