"""The shape of Mistral-7B and of smaller models in its proportions, as config.json has it; which layers are adapted."""

from typing import Any

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {"qv": ["q_proj", "v_proj"], "all": ALL_LINEAR}
VOCABULARY = 32768


def mistral_config(hidden: int, layers: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Heads of 128, a quarter of them for keys; at least four heads."""
    heads = max(hidden // 128, 4)
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": int(hidden * 3.5),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocabulary,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    }
