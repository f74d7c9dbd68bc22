"""Small configurations of many families, as transformers itself writes them."""

import json
from typing import Any

SMALL = {
    **dict.fromkeys(("hidden_size", "sliding_window"), 64),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank"), 32
    ),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("num_attention_heads", "num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
"""What of it a family's configuration knows is taken."""


def configuration(kind: str) -> dict[str, Any]:
    """A small configuration of this family, as transformers writes it and this package reads it."""
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind).to_dict()
    values = {name: value for name, value in SMALL.items() if name in known}
    if kind == "gemma3":
        sizes = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        values = {"text_config": SMALL, "vision_config": sizes, "vocab_size": SMALL["vocab_size"]}
    return {"num_experts": 4, "head_dim": 16, **json.loads(AutoConfig.for_model(kind, **values).to_json_string())}
