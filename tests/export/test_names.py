"""What layers are called: mlx-lm's models beside transformers' own modules, built from the same small configuration."""

from typing import Any

import pytest

from mlx_trainer.export.peft.names import SAME_NAMES, to_transformers
from mlx_trainer.models import ModelError
from mlx_trainer.models.hf_config import normalised
from tests.export.families import configuration

torch = pytest.importorskip("torch", reason="torch is not installed (pip install 'mlx-trainer[interop]')")

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3")


def theirs(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The layers that PEFT can adapt in transformers' model, by name, with the shapes of their weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    return {name: tuple(layer.weight.shape) for name, layer in model.named_modules() if isinstance(layer, kinds)}


def ours(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The layers of mlx-lm's model that have a matrix."""
    from mlx_lm.utils import _get_classes

    settings = normalised(settings, set() if settings.get("tie_word_embeddings") else {"lm_head.weight"})
    kind, arguments = _get_classes(settings)
    layers = kind(arguments.from_dict(settings)).named_modules()
    return {name: layer.weight.shape for name, layer in layers if "weight" in layer and layer.weight.ndim >= 2}


@pytest.mark.parametrize("kind", [*SAME_NAMES, "gemma3", *MIXTURES])
def test_every_layer_has_its_name_there_or_is_refused(kind: str) -> None:
    """One that gets a name has a layer of the same shape there; only mixtures of experts have any that get none."""
    settings = configuration(kind)
    there, refused = theirs(settings), []
    for path, shape in ours(settings).items():
        try:
            name = to_transformers(path)
        except ModelError:
            refused.append(path)
            continue
        assert there.get(name) == shape, (path, name)
        assert name == path or kind == "gemma3"
    assert bool(refused) == (kind in MIXTURES)
    assert all(not name.endswith(("q_proj", "o_proj")) for name in refused)
