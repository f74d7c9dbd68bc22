"""Held-out loss, perplexity, metrics of your own, and generated samples."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import mlx.core as mx

from mlx_trainer.eval_mode import eval_mode
from mlx_trainer.state import preserved_random_state
from mlx_trainer.traced import from_tree, number, restored_on_error, shape_key, to_tree

if TYPE_CHECKING:
    from mlx_trainer.module import TrainerModule

Metric = Callable[["TrainerModule", Any], tuple[mx.array, mx.array]]
"""A metric of your own: from the module and a batch to scalars (sum, weight), traced; its value is Σ sum / Σ weight."""


@attrs.frozen
class EvalMetrics:
    """The mean loss on held-out rows, and what was measured beside it."""

    loss: float
    """In nats per weight (per trained token of a language model)."""
    batches: int
    seconds: float
    counts: Mapping[str, int] = attrs.field(factory=dict)
    """Sums of `module.count(batch)`."""
    metrics: dict[str, float] = attrs.field(factory=dict)
    """Means of the module's metrics and of your own; what is added in `on_evaluation_end` reaches the loggers."""
    of_tokens: bool = True
    """Whether the loss is the mean of what tokens cost, so that its exp is a perplexity (`module.loss_of_tokens`)."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def samples(self) -> int:
        """Rows evaluated; batches, where the module does not count rows."""
        return self.counts.get("rows", self.batches)

    @property
    def average_length(self) -> float:
        """Tokens per row; nan where the module does not count tokens."""
        return self.counts["tokens"] / self.samples if "tokens" in self.counts else math.nan

    def as_dict(self) -> dict[str, float]:
        """By TensorBoard tag: val/loss, val/perplexity where the loss is of tokens, and each further metric."""
        named = {f"val/{name}": value for name, value in self.metrics.items()}
        return {"val/loss": self.loss} | ({"val/perplexity": self.perplexity} if self.of_tokens else {}) | named


@attrs.frozen
class GeneratedSample:
    """What the model said to a prompt, beside what the data says."""

    prompt: str
    generated_text: str
    reference: str | None = None


class TextGenerator(Protocol):
    """A module that can write."""

    def generate(
        self, prompts: Sequence[Any], *, max_tokens: int = ..., temperature: float = ..., timeout_s: float | None = ...
    ) -> list[str]:
        """One text for each prompt."""


def generate_samples(
    module: TextGenerator,
    prompts: Sequence[str],
    references: Sequence[str | None] | None = None,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    timeout_s: float | None = None,
) -> list[GeneratedSample]:
    """What `module` answers to each prompt; the training run's randomness is not touched.

    A prompt still being answered after `timeout_s` seconds gives the text so far.
    """
    with preserved_random_state():
        texts = module.generate(prompts, max_tokens=max_tokens, temperature=temperature, timeout_s=timeout_s)
    return [
        GeneratedSample(*sample) for sample in zip(prompts, texts, references or [None] * len(prompts), strict=True)
    ]


class EvaluationStep:
    """The compiled validation loss of a module, with further metrics; call it with the batches to evaluate."""

    def __init__(self, module: "TrainerModule", metrics: Mapping[str, Metric] | None = None) -> None:
        self.module, self.metrics = module, dict(metrics or {})
        self._sums = mx.compile(self._traced_sums, inputs=[module.model.state])
        self._seen: set[Any] = set()

    def __call__(self, batches: Iterable[Any]) -> EvalMetrics:
        """Evaluate in eval mode, the former mode restored afterwards. Raises ValueError without a single weight."""
        start = time.perf_counter()
        counts: Counter[str] = Counter()
        sums: list[Any] = []
        with eval_mode(self.module.model):
            for batch in batches:
                self.module.check_batch(batch)
                sums.append(self._batch_sums(to_tree(batch)))
                mx.async_eval(sums[-1])
                mx.eval(sums[-2:-1])  # waits for the batch before: at most one ahead, so memory stays bounded
                counts.update(self.module.count(batch))
        means = weighted_means(sums)
        if "loss" not in means:
            raise ValueError("nothing to evaluate: the validation batches hold no row with a trained token")
        loss, seconds = means.pop("loss"), time.perf_counter() - start
        return EvalMetrics(loss, len(sums), seconds, dict(counts), means, self.module.loss_of_tokens)

    def _batch_sums(self, tree: Any) -> Any:
        if (shape := shape_key(tree)) in self._seen:
            return self._sums(tree)
        with restored_on_error([self.module.model.state]):
            sums = self._sums(tree)
        self._seen.add(shape)
        return sums

    def _traced_sums(self, tree: Any) -> dict[str, tuple[mx.array, mx.array]]:
        batch = from_tree(tree)
        output = self.module.validation_loss(batch)
        sums = {"loss": (output.total, output.weight)}
        sums |= {name: (total, output.weight) for name, total in output.metrics.items()}
        return sums | {name: metric(self.module, batch) for name, metric in self.metrics.items()}


def weighted_means(sums: Sequence[Mapping[str, tuple[mx.array, mx.array]]]) -> dict[str, float]:
    """Σ total / Σ weight for each name that has any weight; the one place where an evaluation reads the device."""
    totals: dict[str, list[float]] = {}
    for each in sums:
        for name, pair in each.items():
            entry = totals.setdefault(name, [0.0, 0.0])
            entry[0] += number(pair[0])
            entry[1] += number(pair[1])
    return {name: total / weight for name, (total, weight) in totals.items() if weight}


def predictions(module: "TrainerModule", batches: Iterable[Any]) -> list[Any]:
    """`module.predict(batch)` for each batch, computed, the model in eval mode."""
    outputs = []
    with eval_mode(module.model):
        for batch in batches:
            outputs.append(module.predict(from_tree(to_tree(batch))))
            mx.eval(outputs[-1])
    return outputs
