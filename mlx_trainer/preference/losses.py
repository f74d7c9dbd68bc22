"""The losses of a pair, of the log-probabilities of its two answers: pure functions, (pairs,) in and (pairs,) out.

`beta` and the names of the losses are TRL's.
"""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

LossType = Literal["sigmoid", "ipo", "hinge"]
NEARLY_CERTAIN = -1e-6
"""No mean log-probability counts as higher: float32 tells but rounding of it, and the odds would be endless."""


def sigmoid_loss(ratios: mx.array, beta: float, label_smoothing: float = 0.0) -> mx.array:
    """Return -(1 - ε) log σ(β r) - ε log σ(-β r): DPO, and cDPO where a share ε of the pairs is taken to be swapped.

    `ratios` is r = (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected): https://arxiv.org/abs/2305.18290,
    equation 7, and for ε https://ericmitchell.ai/cdpo.pdf.
    """
    logits = beta * ratios
    return (1 - label_smoothing) * softplus(-logits) + label_smoothing * softplus(logits)


def ipo_loss(ratios: mx.array, beta: float) -> mx.array:
    """Return (r - 1 / (2 β))², r of mean log-probabilities as in TRL: https://arxiv.org/abs/2310.12036, equation 17."""
    return mx.square(ratios - 1 / (2 * beta))


def hinge_loss(ratios: mx.array, beta: float) -> mx.array:
    """Return max(0, 1 - β r), SLiC's loss of ratios: https://arxiv.org/abs/2309.06657."""
    return mx.maximum(1 - beta * ratios, 0)


LOSSES: dict[LossType, Callable[..., mx.array]] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss}


def odds_ratio_loss(chosen: mx.array, rejected: mx.array) -> mx.array:
    """Return -log σ(log odds(chosen) - log odds(rejected)), of mean log-probabilities.

    ORPO's L_OR, https://arxiv.org/abs/2403.07691, equation 7.
    """
    return softplus(log_odds(rejected) - log_odds(chosen))


def softplus(x: mx.array) -> mx.array:
    """Return log(1 + exp(x)), which is -log σ(-x), without overflow."""
    return mx.logaddexp(x, 0.0)


def log_odds(log_probability: mx.array) -> mx.array:
    """Return log(p / (1 - p)) of log p."""
    log_probability = mx.minimum(log_probability, NEARLY_CERTAIN)
    return log_probability - log1mexp(log_probability)


def log1mexp(x: mx.array) -> mx.array:
    """Return log(1 - exp(x)) for x < 0, of full precision near 0 and far from it.

    Martin Mächler, "Accurately Computing log(1 - exp(-|a|))", 2012, equation 7.
    """
    near = x > -0.6931472
    # Each branch sees only what it is for: the gradient of the other would be 0 · inf there.
    small, large = mx.where(near, x, -0.5), mx.where(near, -1.0, x)
    return mx.where(near, mx.log(-mx.expm1(small)), mx.log1p(-mx.exp(large)))
