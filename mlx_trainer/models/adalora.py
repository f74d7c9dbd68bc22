"""AdaLoRA: adapters `P Λ Q` whose ranks are decided while they train (https://arxiv.org/abs/2303.10512).

The update of a layer is three factors (`lora/adalora.py`), and the loss keeps the outer two near orthogonality. Ranks
beyond a falling budget lose their Λ (`rank_allocation.py`). Names and rules are those of PEFT's `AdaLoraConfig`, but
that its `init_r` is `LoRAConfig.rank`.
"""

import copy
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import asdict, evolve
from mlx.optimizers import Optimizer
from mlx.utils import tree_unflatten

from mlx_trainer.config import AdaLoRAConfig
from mlx_trainer.models.adapters import save_adapters
from mlx_trainer.models.causal_lm import CausalLMModule
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora import LoRALinear, adapted_layers
from mlx_trainer.models.lora.adalora import AdaLoRALinear, mean_rank, orthogonality
from mlx_trainer.models.rank_allocation import with_allocation
from mlx_trainer.models.unpadded import takes_unpadded
from mlx_trainer.module import LossOutput, TrainerModule

log = logging.getLogger("mlx_trainer.models")


class AdaLoRAModule(CausalLMModule):
    """A `CausalLMModule` whose adapters share a budget of ranks.

    `train/rank` is the mean rank, `train/orthogonality` the penalty R, and `train/loss` has `orth_reg_weight * R` in
    it. What is saved is an ordinary LoRA adapter that any program opens, Λ taken into `lora_b` and pruned ranks left
    out; `weights.safetensors` beside it has the three factors, from which training goes on.
    """

    def __init__(self, model_name_or_path: Any, *, adalora: AdaLoRAConfig, **arguments: Any) -> None:
        super().__init__(model_name_or_path, **arguments)
        if self.lora is None or adalora.target_r is None or adalora.target_r > self.lora.rank:
            raise ModelError(f"adalora.target_r is {adalora.target_r}; it must be 1 to lora.rank, where ranks begin.")
        self.adalora = adalora

    @property
    def batch_layout(self) -> Any:
        """ "unpadded" where the model can take it: what this loss adds does not look at the batch."""
        return "unpadded" if takes_unpadded(self.settings) else "padded"

    def inject_lora(self, model: nn.Module) -> nn.Module:
        """Freeze `model` and put `AdaLoRALinear` on the layers that `lora` chooses; raises ModelError for others."""
        model = super().inject_lora(model)
        layers = adapted_layers(model)
        for path, layer in layers.items():
            if type(layer) is not LoRALinear or "_start_a" in layer:
                raise ModelError(f"AdaLoRA is for linear layers without DoRA and with the default start, not {path}.")
        keys = mx.random.split(mx.random.key(self.seed), len(layers))
        adapted = [(path, AdaLoRALinear(layer, key)) for (path, layer), key in zip(layers.items(), keys, strict=True)]
        model.update_modules(tree_unflatten(adapted))
        return model.train(model.training)

    def training_loss(self, batch: Any) -> LossOutput:
        """Return the loss, in training mode with `orth_reg_weight` times the penalty for each unit of its weight."""
        output = super().training_loss(batch)
        if not self.model.training:
            return output
        layers = list(adapted_layers(self.model).values())
        # Times the weight, so that it is added once to the mean loss over however many micro-batches.
        penalty, rank = orthogonality(layers) * output.weight, mean_rank(layers) * output.weight
        total = output.total + self.adalora.orth_reg_weight * penalty
        return evolve(output, total=total, metrics={**output.metrics, "orthogonality": penalty, "rank": rank})

    def configure_optimizer(self, total_steps: int | None) -> Optimizer:
        """Return the optimizer, which allocates ranks too; raises ModelError where the run has no room for that."""
        return with_allocation(super().configure_optimizer(total_steps), self.adalora, total_steps)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what the adapters are, and the rules of the budget."""
        return {**super().fingerprint(), **{f"adalora_{name}": value for name, value in asdict(self.adalora).items()}}

    def save(self, directory: Path) -> None:
        """Write an ordinary adapter, and what training goes on from; tells the ranks."""
        TrainerModule.save(self, directory)
        plain = folded(self.model)
        log.info("AdaLoRA adapters: %s", ranks_text(adapted_layers(plain)))
        save_adapters(plain, directory, base=self.name)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote; raises ModelError, and changes nothing, where it does not fit."""
        try:
            TrainerModule.load(self, directory)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{directory} has no adapters that AdaLoRA goes on from: {error}") from error


def folded(tree: Any) -> Any:
    """The same model with ordinary LoRA layers in place of `AdaLoRALinear`; its arrays are shared, its modules new."""
    if isinstance(tree, AdaLoRALinear):
        return tree.folded()
    if isinstance(tree, nn.Module):
        new = copy.copy(tree)
        dict.update(new, {name: folded(value) for name, value in tree.items()})
        return new
    return [folded(value) for value in tree] if isinstance(tree, list) else tree


def ranks_text(layers: Mapping[str, Any]) -> str:
    """Which rank how many of these ordinary `layers` have.

    >>> ranks_text({"q_proj": {"lora_a": mx.ones((8, 2))}, "v_proj": {"lora_a": mx.ones((8, 5))}})
    '1 of rank 2, 1 of rank 5'
    """
    counts = Counter(layer["lora_a"].shape[1] for layer in layers.values())
    return ", ".join(f"{count} of rank {rank}" for rank, count in sorted(counts.items()))
