"""Do two models compute the same? Their logits on a few rows tell, and what is told is one line."""

from typing import Any

import mlx.core as mx
import numpy as np
from attrs import frozen

from mlx_trainer.eval_mode import eval_mode
from mlx_trainer.module import TrainerModule

ROUNDING = 1e-5
"""Logits further apart than this share of their size are not those of one function in another order of sums."""
LOST = 0.01
"""In 16 bits rounding alone is more: then the adapter's own effect is the measure, and this share of it may be lost."""


@frozen
class Difference:
    """How far logits are from those expected: as a number, as a share of their size, and in what they would say.

    `relative` is ‖other - expected‖ / ‖expected‖; `argmax_agreement` the share, 0 to 1, of positions with the same
    likeliest token.
    """

    max_abs: float
    relative: float
    argmax_agreement: float

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"logits differ by at most {self.max_abs:.1e} ({self.relative:.1e} of their size), "
            f"{100 * self.argmax_agreement:.4g} % same first guess"
        )


def logits_of(module_or_model: Any, ids: mx.array) -> mx.array:
    """Return the logits, (rows, length, vocabulary) in float32, of a `TrainerModule` or a model that maps ids to them.

    They are without dropout; the mode is afterwards what it was.
    """
    model = module_or_model.model if isinstance(module_or_model, TrainerModule) else module_or_model
    with eval_mode(model):
        logits: mx.array = model(ids).astype(mx.float32)
        mx.eval(logits)
    return logits


def difference(expected: mx.array, other: mx.array) -> Difference:
    """Return how far `other` is from `expected`, both (…, vocabulary); NaN where either of them is not finite."""
    apart, same = mx.abs(other - expected), expected.argmax(axis=-1) == other.argmax(axis=-1)
    return Difference(float(mx.max(apart)), share(apart, expected), float(mx.mean(same)))


def share(part: mx.array, whole: mx.array) -> float:
    """Return ‖part‖ / ‖whole‖; 0 where both are nothing, infinite where only `whole` is."""
    part_norm, whole_norm = norm(part), norm(whole)
    if whole_norm == 0:
        return 0.0 if part_norm == 0 else float("inf")
    return part_norm / whole_norm


def norm(value: mx.array) -> float:
    """Return ‖value‖: of each row first, since float32 loses where it adds up millions of squares."""
    return float(mx.linalg.norm(mx.linalg.norm(value, axis=-1)))


def same_function(base: mx.array, expected: mx.array, other: mx.array, *, half: bool = False) -> bool:
    """Whether `other` is `expected` up to rounding, in `half` precision up to 1 % of what the adapter does.

    `base` are the logits without the adapter, which tell its effect. Anything not finite is no.
    """
    rounding = share(other - expected, expected) <= ROUNDING
    return rounding or (half and share(other - expected, expected - base) <= LOST)


def sample_ids(vocabulary: int, *, rows: int = 4, length: int = 32) -> mx.array:
    """Return (rows, length) token ids, always the same: what an adapter does shows on any text."""
    return mx.array(np.random.default_rng(0).integers(vocabulary, size=(rows, length)), mx.int32)
