"""Which layers of a model get an adapter: by the names and patterns of `lora.target_modules`."""

import difflib
from collections.abc import Sequence

import mlx.nn as nn

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora.layers import Linear


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Return the linear layers of `model` by their dotted path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.QuantizedLinear))
    }


def target_paths(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the sorted `paths` whose last components are one of `targets`; raises ModelError for one that has none.

    >>> target_paths(["layers.0.self_attn.q_proj", "layers.0.mlp.up_proj"], ["self_attn.q_proj"])
    ['layers.0.self_attn.q_proj']
    """
    matches = {target: [path for path in paths if f".{path}".endswith(f".{target}")] for target in targets}
    unmatched = [target for target, matched in matches.items() if not matched]
    if unmatched or not targets:
        raise ModelError(unmatched_message(unmatched, sorted({path.rpartition(".")[2] for path in paths})))
    return sorted({path for matched in matches.values() for path in matched})


def unmatched_message(unmatched: Sequence[str], names: Sequence[str]) -> str:
    """Return the error's text for `unmatched` target modules where the linear layers are called `names`."""
    near = [match for target in unmatched for match in difflib.get_close_matches(target, names, n=1)]
    hint = f" Did you mean {', '.join(near)}?" if near else ""
    wrong = f"no linear layer is called {', '.join(unmatched)}" if unmatched else "no layer was named"
    return f"lora.target_modules: {wrong}.{hint} This model's linear layers are {', '.join(names) or 'none'}."
