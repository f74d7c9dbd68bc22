"""What a model must supply to be trained: a loss, an optimizer, and a way to be saved."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

WEIGHTS_FILE = "weights.safetensors"


@attrs.frozen
class LossOutput:
    """A loss as sums, so that micro-batches of unequal size add up to the loss of all their tokens.

    `total` is the summed loss and `weight` the number of things summed (trained tokens, or rows), both float32
    scalars; the mean loss is `total / weight`. Each of `metrics` is a sum too, and is reported divided by `weight`.
    """

    total: mx.array
    weight: mx.array
    metrics: Mapping[str, mx.array] = attrs.field(factory=dict)


class TrainerModule:
    """A model with its loss and its optimizer. Subclass it; `model` and `training_loss` are what you must give.

        class Regression(TrainerModule):
            def __init__(self):
                self.model = nn.Linear(8, 1)

            def training_loss(self, batch):
                error = self.model(batch["x"]) - batch["y"]
                return LossOutput(total=mx.square(error).sum(), weight=mx.array(error.size, mx.float32))

    A batch is a tree (dict, list, tuple) of arrays, or an attrs object whose fields are such trees. Its field
    `metadata`, if it has one, stays on the host: it is None inside the traced losses.
    """

    model: nn.Module
    """Its `trainable_parameters()` are what is optimized; the rest stays frozen."""

    artifact: str = "model"
    """The folder name of the finished result inside a run."""

    loss_of_tokens: bool = True
    """Whether the loss is what tokens cost in nats, of which evaluations tell exp(loss) as the perplexity."""

    @property
    def batch_layout(self) -> str | None:
        """The layout of batches that the losses are quickest with, for data that has several; None: as it comes."""
        return None

    def setup(self, stage: str) -> None:
        """Called before `stage` ("fit", "validate" or "predict"): load or build `model` here. Must be idempotent."""

    def training_loss(self, batch: Any) -> LossOutput:
        """The loss of one micro-batch. Traced by `mx.compile`, so it must not read any value on the host."""
        raise TypeError(f"{type(self).__name__} must define training_loss(batch) -> LossOutput")

    def parts(self, batch: Any) -> Sequence[Any]:
        """Batches of about equal cost whose losses add up to that of `batch`, which a Linux CPU computes side by side.

        Called on the host at every step there, and nowhere else; `batch` alone, as here, is computed on one core.
        """
        return [batch]

    def validation_loss(self, batch: Any) -> LossOutput:
        """The loss on held-out rows, the model being in eval mode. Traced."""
        return self.training_loss(batch)

    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        """The optimizer of a run of `total_steps` updates (None where only time limits the run)."""
        return optimizers.AdamW(learning_rate=1e-3, bias_correction=True)

    def fingerprint(self) -> Mapping[str, Any]:
        """What of it decides on the trained numbers, as JSON values by name, beside what the trainer sees itself.

        The trainer sees the optimizer's class and constants, and the frozen parameters. A run is resumed only where
        these are what they were, or where `Trainer(allow_changes=…)` names what is not.
        """
        return {}

    def count(self, batch: Any) -> Mapping[str, int]:
        """Sizes of a batch known on the host, such as {"tokens": 700, "positions": 768}; each is logged per second.

        From tokens, positions (what is computed, padding included) and shared_tokens (what is not computed again, if
        there is any) the share of padding is logged too.
        """
        return {}

    def check_batch(self, batch: Any) -> None:
        """Called on the host before anything is computed of `batch`: raise here for what a kernel must not see."""

    def memory_estimate(self, batch: Any) -> int | None:
        """The bytes that a training step of `batch` holds at its peak, model included; None where that is not known."""
        return None

    def predict(self, batch: Any) -> Any:
        """The output for one batch, the model being in eval mode."""
        return self.model(batch)

    def save(self, directory: Path) -> None:
        """Write the trainable parameters into an existing `directory`."""
        parameters = dict(tree_flatten(self.model.trainable_parameters()))
        # Through a file object: a full disk is then an OSError with its number, not a bare RuntimeError.
        with (directory / WEIGHTS_FILE).open("wb") as file:
            mx.save_safetensors(file, parameters)

    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Raises ValueError where names or shapes differ from the model's."""
        path = directory / WEIGHTS_FILE
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        check_parameters(dict(tree_flatten(self.model.trainable_parameters())), loaded, str(path))
        mx.eval(loaded)  # mx.load is lazy: read now, before the file may change
        self.model.update(tree_unflatten(list(loaded.items())))


def check_parameters(expected: Mapping[str, mx.array], found: Mapping[str, mx.array], source: str) -> None:
    """Raise ValueError, naming up to five tensors, where `found` lacks, adds or reshapes any of `expected`."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not a parameter of this model" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, the model's has {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems[:5])}{more}")
