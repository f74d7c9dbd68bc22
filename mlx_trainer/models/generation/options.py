"""The options of an answer, and how its tokens are chosen by them: the likeliest, or drawn with keys of one's own."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from attrs import Attribute, field, frozen

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.libraries import quiet_imports

Sampler = Callable[[mx.array], mx.array]
"""From log-probabilities (rows, vocabulary) to ids (rows,)."""
Processor = Callable[[mx.array, mx.array], mx.array]
"""From the ids so far (length,) and logits (1, vocabulary) to other logits."""


def above(least: float, most: float = float("inf"), *, least_too: bool = True) -> Any:
    """A validator that raises ModelError for a number outside `least` to `most`; None is passed over."""

    def check(_: object, option: "Attribute[Any]", value: float | None) -> None:
        if value is not None and not ((least <= value if least_too else least < value) and value <= most):
            begin = f"{'at least' if least_too else 'above'} {least:g}"
            raise ModelError(f"{option.name} is {value!r}; it must be {begin}{f' and at most {most:g}' * (most < 2)}.")

    return check


def texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One text or several as several; raises ModelError for an empty one."""
    several = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in several:
        raise ModelError("stop holds an empty text, before which every answer would end.")
    return several


@frozen(kw_only=True)
class Options:
    """What is asked of an answer, under Hugging Face's names; raises ModelError for a value out of range.

    At temperature 0 the likeliest token is taken. `top_p` keeps the likeliest tokens that together have this
    probability (https://arxiv.org/abs/1904.09751), `min_p` those with at least this share of the likeliest one's
    (https://arxiv.org/abs/2407.01082), both before the temperature is applied, as mlx-lm does. `repetition_penalty`
    divides the positive logits of the last 20 tokens and multiplies the negative ones
    (https://arxiv.org/abs/1909.05858).
    """

    max_tokens: int = field(default=256, validator=above(1))
    temperature: float = field(default=0.0, validator=above(0))
    top_p: float = field(default=1.0, validator=above(0, 1, least_too=False))
    min_p: float = field(default=0.0, validator=above(0, 1))
    repetition_penalty: float = field(default=1.0, validator=above(0, least_too=False))
    timeout_s: float | None = field(default=None, validator=above(0))
    stop: Sequence[str] = field(default=(), converter=texts)
    system: str | None = None

    def sampler(self, seed: int) -> Sampler:
        """Return what chooses a token; above temperature 0 it draws with keys made of `seed` alone."""
        with quiet_imports():
            from mlx_lm.sample_utils import apply_min_p, apply_top_p, greedy_sampler

        if self.temperature == 0:
            return greedy_sampler
        filters = [partial(apply_top_p, top_p=self.top_p)] if self.top_p < 1 else []
        filters += [partial(apply_min_p, min_p=self.min_p)] if self.min_p > 0 else []
        return drawing(self.temperature, filters, mx.random.key(seed))

    def processors(self) -> list[Processor]:
        """Return what changes the logits before they are normalized."""
        with quiet_imports():
            from mlx_lm.sample_utils import make_repetition_penalty

        return [make_repetition_penalty(self.repetition_penalty)] if self.repetition_penalty != 1 else []


def drawing(temperature: float, filters: Sequence[Sampler], key: mx.array) -> Sampler:
    """Return a sampler with its own sequence of keys, so that MLX's random state is neither read nor moved."""

    def sample(log_probabilities: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        for keep in filters:
            log_probabilities = keep(log_probabilities)
        return mx.random.categorical(log_probabilities.astype(mx.float32) / temperature, key=now)

    return sample
