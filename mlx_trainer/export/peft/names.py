"""What a layer is called in mlx-lm's model and in transformers'.

Most families have one name for both; `tests/export/test_names.py` compares them with transformers' own modules.
"""

from collections.abc import Collection, Mapping

from mlx_trainer.models.error import ModelError

SAME_NAMES = (
    *("cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3_text", "glm", "granite", "helium", "llama"),
    *("ministral3", "mistral", "nemotron", "olmo2", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3"),
    "starcoder2",
)
"""Model types whose linear layers and embeddings have been compared."""

NO_LINEAR = ("gate", "layer", "router")
"""The last names of routers: linear layers in mlx-lm, modules of another kind in transformers, so PEFT adapts none."""

INNER = "language_model.model."
OUTER = "model.language_model."


def to_transformers(path: str) -> str:
    """Return transformers' name of mlx-lm's layer `path`; raises ModelError for one that is no layer of its own there.

    Models with vision, such as gemma3, have their text model one level deeper there.
    """
    last = path.rpartition(".")[2]
    if last in NO_LINEAR or "switch_mlp" in path or ".experts." in path:
        raise ModelError(
            f"{path} is part of a mixture of experts, which transformers holds otherwise; merge it instead."
        )
    if last in ("embed_q", "unembed_out"):
        raise ModelError(f"{path} is half of transformers' kv_b_proj, which PEFT cannot adapt; merge it instead.")
    if path.startswith(INNER):
        return OUTER + path.removeprefix(INNER)
    return path.removeprefix("language_model.")


def to_mlx(paths: Collection[str]) -> Mapping[str, str]:
    """Return mlx-lm's name of each of transformers' `paths`, which are all those of one adapter."""
    inner = any(path.startswith((OUTER, INNER)) for path in paths)

    def renamed(path: str) -> str:
        if path.startswith(OUTER):
            return INNER + path.removeprefix(OUTER)
        return f"language_model.{path}" if inner and path == "lm_head" else path

    return {path: renamed(path) for path in paths}
