"""Modules that learn from pairs of answers, of which one is preferred: `DPOModule` and `ORPOModule`."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.models.lora import trainable
from mlx_trainer.models.unpadded import hidden_states, takes_unpadded
from mlx_trainer.module import LossOutput
from mlx_trainer.preference.answers import Answers, adapters_off, padded_answers, parameters_as, unpadded_answers
from mlx_trainer.preference.losses import LOSSES, LossType, odds_ratio_loss

ModelName = str | os.PathLike[str]
Metrics = Mapping[str, mx.array]


class PreferenceModule(CausalLMModule):
    """A `CausalLMModule` for batches of pairs, whose rows 2i and 2i + 1 are the chosen and the rejected of pair i.

    They come of `DataPipeline(…, pairs=True)`. Losses and metrics are summed over pairs; `rewards/…` and `logps/…` are
    called as in TRL. Subclasses give `pair_losses`.
    """

    loss_of_tokens = False

    def __init__(self, model_name_or_path: ModelName, **arguments: Any) -> None:
        super().__init__(model_name_or_path, **arguments)
        if self.neftune_noise_alpha is not None:
            raise ModelError("neftune_noise_alpha is for next-token training; leave it out of preference training.")

    def pair_losses(self, batch: Any, chosen: Answers, rejected: Answers) -> tuple[mx.array, Metrics]:
        """Return the loss of each pair, (pairs,), and metrics of each, (pairs,), by name."""
        raise TypeError(f"{type(self).__name__} must define pair_losses; DPOModule and ORPOModule do")

    @property
    def batch_layout(self) -> Literal["padded", "unpadded"]:
        """ "unpadded" where the model can take it, and no subclass has a forward of its own."""
        replaced = type(self).forward is not CausalLMModule.forward
        return "unpadded" if takes_unpadded(self.settings) and not replaced else "padded"

    def training_loss(self, batch: Any) -> LossOutput:
        """Return the losses of the pairs; a pair of padding alone weighs nothing."""
        chosen, rejected = self.score(batch).sides()
        losses, metrics = self.pair_losses(batch, chosen, rejected)
        metrics = {**metrics, "logps/chosen": chosen.log_probabilities, "logps/rejected": rejected.log_probabilities}
        real = chosen.tokens > 0
        sums = {name: mx.where(real, mx.stop_gradient(each), 0).sum() for name, each in metrics.items()}
        return LossOutput(mx.where(real, losses, 0).sum(), real.astype(mx.float32).sum(), sums)

    def score(self, batch: Any) -> Answers:
        """Return the log-probabilities of all answers of `batch`, (rows,), as the model is now."""
        policy = self.recomputation(batch)
        if hasattr(batch, "cells"):
            states = hidden_states(self.model, batch, policy)
            return unpadded_answers(self.model, states, batch, self.settings["vocab_size"])
        return padded_answers(self.forward(batch), batch.labels)

    def check_batch(self, batch: Any) -> None:
        """Raise ModelError for a batch that is not of pairs, or has a token id beyond the vocabulary."""
        if not batch.metadata.pairs:
            raise ModelError(f"{type(self).__name__} needs pairs of answers: make the data with pairs=True.")
        self.check_ids(batch)

    def count(self, batch: Any) -> Mapping[str, int]:
        """Return the same as for other batches, but `rows` are those of the data: pairs."""
        return {**super().count(batch), "rows": batch.metadata.pairs}


class DPOModule(PreferenceModule):
    """Direct preference optimization (https://arxiv.org/abs/2305.18290), with the model before training as reference.

    `beta` is how much a change of log-probability counts, so that a larger one stays closer to the reference.
    `loss_type` is "sigmoid", "ipo" or "hinge"; `label_smoothing`, below 0.5 and for "sigmoid" alone, is the share of
    pairs that are taken to be swapped. Other arguments are those of `CausalLMModule`.

    The reference is the frozen base under the adapters, without dropout: no second copy, and one forward more a step,
    unless `precompute_reference` was called. Where training begins at adapters that were trained before,
    `keep_reference` makes these the reference. Without adapters (`lora=None`) one of both must be called, or steps
    raise ModelError.
    """

    def __init__(
        self,
        model_name_or_path: ModelName,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: LossType = "sigmoid",
        **arguments: Any,
    ) -> None:
        super().__init__(model_name_or_path, **arguments)
        check_loss(loss_type, beta, label_smoothing)
        self.beta, self.label_smoothing, self.loss_type = beta, label_smoothing, loss_type
        self.kept: Mapping[str, mx.array] = {}

    def keep_reference(self) -> None:
        """Let the model as it is now be the reference of all that follows, and not its base.

        It is what TRL does with an adapter that it begins at. Costs a copy of what trains.
        """
        self.kept = {name: mx.array(value) for name, value in trainable(self.model).items()}
        mx.eval(self.kept)

    def pair_losses(self, batch: Any, chosen: Answers, rejected: Answers) -> tuple[mx.array, Metrics]:
        """Return DPO's losses and the implicit rewards β (log π - log π_ref)."""
        reference = self.reference(batch)
        better, worse = (
            self.ratio(side, of_side) for side, of_side in ((chosen, reference[::2]), (rejected, reference[1::2]))
        )
        smoothing = {"label_smoothing": self.label_smoothing} if self.loss_type == "sigmoid" else {}
        losses = LOSSES[self.loss_type](better - worse, self.beta, **smoothing)
        return losses, rewards(self.beta * better, self.beta * worse)

    def ratio(self, answers: Answers, reference: mx.array) -> mx.array:
        """Return log π - log π_ref of each answer, (pairs,): summed over its tokens, for "ipo" their mean as in TRL."""
        ratios = Answers(answers.log_probabilities - reference, answers.tokens)
        return ratios.means if self.loss_type == "ipo" else ratios.log_probabilities

    def reference(self, batch: Any) -> mx.array:
        """Return the reference's log-probability of each answer, (rows,): the batch's own, that kept, or the base's."""
        if hasattr(batch, "reference"):
            known: mx.array = batch.reference
            return known
        if self.lora is None and not self.kept:
            raise ModelError(
                "DPO compares with the model before training, which full fine-tuning (lora=None) overwrites: call "
                "precompute_reference(module, data) before, train adapters, or use ORPO, which needs no reference."
            )
        with parameters_as(self.kept, self.model) if self.kept else adapters_off(self.model):
            return mx.stop_gradient(self.score(batch).log_probabilities)

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what decides on the numbers, the loss and a kept reference included."""
        kept = {"reference": digest(self.kept)} if self.kept else {}
        own = {"beta": self.beta, "label_smoothing": self.label_smoothing, "loss_type": self.loss_type}
        return {**super().fingerprint(), "method": "dpo", **own, **kept}


class ORPOModule(PreferenceModule):
    """Odds ratio preference optimization (https://arxiv.org/abs/2403.07691): L_SFT + λ L_OR, without a reference.

    L_SFT is the mean loss of the chosen answer's tokens; `orpo_lambda` is λ, TRL's `beta` of this loss. Other arguments
    are those of `CausalLMModule`, `lora=None` included.
    """

    def __init__(self, model_name_or_path: ModelName, *, orpo_lambda: float = 0.1, **arguments: Any) -> None:
        super().__init__(model_name_or_path, **arguments)
        if orpo_lambda < 0:
            raise ModelError(f"orpo_lambda is {orpo_lambda}; it must be 0 or more.")
        self.orpo_lambda = orpo_lambda

    def pair_losses(self, batch: Any, chosen: Answers, rejected: Answers) -> tuple[mx.array, Metrics]:
        """Return ORPO's losses; as in TRL, rewards are λ times mean log-probabilities."""
        odds = odds_ratio_loss(chosen.means, rejected.means)
        weight = self.orpo_lambda
        told = {"nll_loss": -chosen.means, "log_odds_ratio": -odds}
        return weight * odds - chosen.means, {**told, **rewards(weight * chosen.means, weight * rejected.means)}

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what decides on the numbers, the loss included."""
        return {**super().fingerprint(), "method": "orpo", "orpo_lambda": self.orpo_lambda}


def check_loss(loss_type: str, beta: float, label_smoothing: float) -> None:
    """Raise ModelError for an unknown loss, and for numbers that it cannot use."""
    if loss_type not in LOSSES:
        raise ModelError(f"loss_type {loss_type!r} is unknown; it is one of {', '.join(LOSSES)}.")
    if beta <= 0:
        raise ModelError(f"beta is {beta}; it must be above 0.")
    if not 0 <= label_smoothing < 0.5:
        raise ModelError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5.")
    if label_smoothing and loss_type != "sigmoid":
        raise ModelError(f'label_smoothing belongs to loss_type "sigmoid"; "{loss_type}" has none.')


def rewards(chosen: mx.array, rejected: mx.array) -> Metrics:
    """Return the rewards of both, how far they are apart, and how often the chosen one has more, (pairs,)."""
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
    }


def digest(arrays: Mapping[str, mx.array]) -> str:
    """16 hexadecimal digits of the names and bytes of `arrays`; reads them."""
    found = hashlib.blake2b(digest_size=8)
    for name, value in sorted(arrays.items()):
        found.update(name.encode() + np.array(value.reshape(-1).view(mx.uint8)).tobytes())
    return found.hexdigest()
