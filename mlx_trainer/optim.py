"""Optimizers and learning-rate schedules by name."""

import difflib
import logging
import math
from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
from attrs import frozen
from mlx.optimizers import Optimizer
from mlx.utils import tree_map, tree_map_with_path

from mlx_trainer.cuda import kernels
from mlx_trainer.fusion import one_by_one
from mlx_trainer.joined import SMALL

log = logging.getLogger("mlx_trainer.optim")

Schedule = Callable[[mx.array], mx.array]
"""The learning rate of an update from the number of updates before it, both scalars."""
Decay = tuple[Callable[[mx.array], mx.array], ...]
"""The operations that make the share left of what decays, 1 to 0, of the progress after the warm-up, 0 to 1."""

SCHEDULES: dict[str, Decay] = {
    "constant": (mx.ones_like,),
    "linear": (lambda progress: 1 - progress,),
    "cosine": (lambda progress: math.pi * progress, mx.cos, lambda cosine: 1 + cosine, lambda double: 0.5 * double),
}


@frozen
class Settings:
    """What an optimizer is made from; `betas` None means the optimizer's own."""

    rate: Schedule
    weight_decay: float
    betas: tuple[float, float] | None

    def momentum(self, default: float) -> float:
        """The first of `betas`, for optimizers that have one moment."""
        return default if self.betas is None else self.betas[0]


class AdamW(optimizers.AdamW):
    """AdamW (https://arxiv.org/abs/1711.05101) of which everything that is done to one parameter is one kernel.

    With gradient g, moments m and v, decay d and t updates, this one counted, as in the paper and in torch:

        m = β₁ m + (1 - β₁) g       v = β₂ v + (1 - β₂) g²
        p = (1 - rate d) p - rate / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + ε)

    What is the same for all parameters is computed by itself, and the last fraction made longer by √(1 - β₂ᵗ), so that
    few operations follow each other: `mx.compile` fuses eleven. By default MLX's own corrects no bias.
    """

    accepted: mx.array | None = None
    """Where it is given and false, `update` leaves every parameter and moment as it is, bit for bit."""

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Return the updated parameters, a tree like `gradients`; on CUDA small ones many at a time."""
        if not kernels.usable(mx.float32):
            return super().apply_gradients(gradients, parameters)
        if not self._initialized:
            self.init(gradients)
        super().apply_gradients({}, {})  # the schedule and the count of steps
        small: list[tuple[mx.array, mx.array, Any]] = []

        def apply(gradient: mx.array, parameter: mx.array, state: Any) -> Any:
            if gradient.size > SMALL or {gradient.dtype, parameter.dtype, state["m"].dtype} != {mx.float32}:
                return self.apply_single(gradient, parameter, state)
            small.append((gradient, parameter, state))
            return len(small) - 1

        updated, done = tree_map(apply, gradients, parameters, self.state), []
        for start in range(0, len(small), kernels.MANY):
            done += self._apply_many(*zip(*small[start : start + kernels.MANY], strict=True))
        return tree_map(lambda leaf: done[leaf] if isinstance(leaf, int) else leaf, updated)

    def _apply_many(self, gradients: Any, parameters: Any, states: Any) -> list[mx.array]:
        moments = [state["m"] for state in states], [state["v"] for state in states]
        scalars = self._scalars(mx.float32)
        new, *moved = kernels.adamw(gradients, parameters, moments, scalars, self.accepted, self.betas)
        for state, m, v in zip(states, *moved, strict=True):
            state["m"], state["v"] = m, v
        return new

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """Return the updated parameter, and put its moments into `state`."""
        (b1, b2), accepted = self.betas, self.accepted

        def chosen(new: mx.array, old: mx.array) -> mx.array:
            return new if accepted is None else mx.where(accepted, new, old)

        kept, rate, epsilon = self._scalars(gradient.dtype)
        m = state["m"] = chosen(b1 * state["m"] + (1 - b1) * gradient, state["m"])
        v = state["v"] = chosen(b2 * state["v"] + (1 - b2) * mx.square(gradient), state["v"])
        return chosen(kept * parameter - rate * m / (mx.sqrt(v) + epsilon), parameter)

    def _scalars(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
        """The share of a parameter that is kept, the rate of its update, and ε."""

        def corrected(beta: float) -> mx.array:
            return one_by_one(self.step, lambda t: t.astype(mx.float32), lambda t: beta**t, lambda power: 1 - power)

        root = one_by_one(corrected(self.betas[1]), mx.sqrt)
        kept = one_by_one(self.learning_rate, lambda rate: rate * self.weight_decay, lambda decay: 1 - decay)
        rate = one_by_one(self.learning_rate, lambda rate: rate * root, lambda rate: rate / corrected(self.betas[0]))
        epsilon = one_by_one(root, lambda root: root * self.eps)
        return kept.astype(dtype), rate.astype(dtype), epsilon.astype(dtype)


def adamw(settings: Settings) -> Optimizer:
    """Return AdamW with bias correction."""
    betas = list(settings.betas or (0.9, 0.999))
    return AdamW(settings.rate, betas=betas, weight_decay=settings.weight_decay, bias_correction=True)


def adam(settings: Settings) -> Optimizer:
    """Return Adam with bias correction; it has no weight decay."""
    if settings.weight_decay:
        log.warning("adam has no weight decay, so %g is not used; adamw has.", settings.weight_decay)
    return optimizers.Adam(settings.rate, betas=list(settings.betas or (0.9, 0.999)), bias_correction=True)


def sgd(settings: Settings) -> Optimizer:
    """Return SGD with the first of `betas` as its momentum, by default none; its decay is added to the gradient."""
    return optimizers.SGD(settings.rate, momentum=settings.momentum(0.0), weight_decay=settings.weight_decay)


def lion(settings: Settings) -> Optimizer:
    """Return Lion; its updates are signs, so it wants a third to a tenth of AdamW's learning rate."""
    return optimizers.Lion(settings.rate, betas=list(settings.betas or (0.9, 0.99)), weight_decay=settings.weight_decay)


def adafactor(settings: Settings) -> Optimizer:
    """Return Adafactor following the schedule: its own relative steps and parameter scaling are off."""
    return optimizers.Adafactor(
        settings.rate, weight_decay=settings.weight_decay, relative_step=False, scale_parameter=False
    )


def muon(settings: Settings) -> Optimizer:
    """Return Muon, made for matrices; vectors get plain momentum steps. Its decay is added to the gradient."""
    return optimizers.Muon(settings.rate, momentum=settings.momentum(0.95), weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[Settings], Optimizer]] = {
    "adamw": adamw,
    "adam": adam,
    "sgd": sgd,
    "lion": lion,
    "adafactor": adafactor,
    "muon": muon,
}


def build_optimizer(
    name: str,
    learning_rate: float,
    *,
    schedule: str = "constant",
    total_steps: int | None = None,
    warmup_steps: int = 0,
    weight_decay: float = 0.01,
    betas: tuple[float, float] | None = None,
    minimum_ratio: float = 0.0,
    loraplus_lr_ratio: float | None = None,
) -> Optimizer:
    """Return the optimizer `name` whose learning rate follows `schedule`, see `build_schedule`; raises ValueError.

    With `loraplus_lr_ratio` it is a `LoRAPlus` too.
    """
    make = OPTIMIZERS[known("optimizer", name, OPTIMIZERS)]
    rate = build_schedule(schedule, learning_rate, total_steps, warmup_steps, minimum_ratio)
    optimizer = make(Settings(rate, weight_decay, betas))
    return optimizer if loraplus_lr_ratio is None else with_loraplus(optimizer, loraplus_lr_ratio)


class LoRAPlus(Optimizer):
    """Any optimizer, but `lora_b` learns at `loraplus_lr_ratio` times the learning rate (https://arxiv.org/abs/2402.12354).

    Vectors, such as DoRA's magnitudes, learn with `lora_b`, as in PEFT's `create_loraplus_optimizer`. A schedule moves
    both rates, and weight decay, which each optimizer multiplies by the rate, goes with them. The learning rate that
    is logged is that of `lora_a`. MLX's `MultiOptimizer` would make a new `state` whenever it is looked at, which a
    compiled step cannot capture.
    """

    loraplus_lr_ratio: float

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Return the updated parameters, a tree like `gradients`."""
        if not self._initialized:
            self.init(gradients)
        super().apply_gradients({}, {})  # the schedule and the count of steps
        rate = self.learning_rate
        faster = self.loraplus_lr_ratio * rate

        def apply(path: str, gradient: mx.array, parameter: mx.array, state: Any) -> mx.array:
            self.state["learning_rate"] = faster if learns_faster(path, gradient) else rate
            updated: mx.array = self.apply_single(gradient, parameter, state)
            return updated

        updated = tree_map_with_path(apply, gradients, parameters, self.state)
        self.state["learning_rate"] = rate
        return updated


def with_loraplus(optimizer: Optimizer, ratio: float) -> Optimizer:
    """Return `optimizer`, now a `LoRAPlus` as well; raises ValueError for a ratio that is not above 0."""
    if not ratio > 0:
        raise ValueError(f"loraplus_lr_ratio is {ratio}; it must be above 0, and 16 is usual.")
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (LoRAPlus, kind), {})
    vars(optimizer)["loraplus_lr_ratio"] = ratio  # among its constants, which a resumed run is compared by
    return optimizer


def learns_faster(path: str, parameter: mx.array) -> bool:
    """Whether LoRA+ gives the parameter at `path` the higher rate."""
    return path.endswith("lora_b") or parameter.ndim == 1


def build_schedule(
    name: str, learning_rate: float, total_steps: int | None, warmup_steps: int = 0, minimum_ratio: float = 0.0
) -> Schedule:
    """Return the learning rate of update k = 0, 1, ... of `total_steps`, with W warm-up steps counted in updates:

        learning_rate * (k + 1) / W                                                   for k < W
        learning_rate * (m + (1 - m) * decay((k - W) / (total_steps - W)))            for k >= W, m = minimum_ratio

    The first update already moves (k + 1, not k), and the last is not wasted on a rate of 0. A warm-up as long as the
    run is shortened to a tenth of it, with a warning. Raises ValueError, also for a decay without an end.
    """
    decay = SCHEDULES[known("schedule", name, SCHEDULES)]
    if total_steps is None and name != "constant":
        raise ValueError(f"The {name} schedule must know its end: set max_steps or max_epochs, or use constant.")
    if learning_rate <= 0:
        raise ValueError(f"The learning rate must be above 0, not {learning_rate}.")
    warmup = warmup_within(warmup_steps, total_steps)
    length = max(1, (total_steps or 0) - warmup)

    def rate(step: mx.array) -> mx.array:
        k = one_by_one(step, lambda step: step.astype(mx.float32))
        since = one_by_one(k, lambda k: k - warmup, lambda k: k / length)
        progress = one_by_one(since, lambda share: mx.maximum(share, 0), lambda share: mx.minimum(share, 1))
        left = one_by_one(progress, *decay, lambda left: (1 - minimum_ratio) * left, lambda left: minimum_ratio + left)
        risen = one_by_one(k, lambda k: k + 1, lambda k: k / max(warmup, 1))
        rising = one_by_one(k, lambda k: k < warmup)
        return one_by_one(rising, lambda rising: mx.where(rising, risen, left), lambda share: learning_rate * share)

    return rate


def warmup_within(warmup_steps: int, total_steps: int | None) -> int:
    """Return the warm-up, cut to a tenth of the run with a warning where it would take the whole of it."""
    if total_steps is None or warmup_steps < max(total_steps, 1):
        return warmup_steps
    shorter = total_steps // 10
    log.warning("A warm-up of %d steps does not fit a run of %d; it takes %d.", warmup_steps, total_steps, shorter)
    return shorter


def known(what: str, name: str, names: Collection[str]) -> str:
    """Return `name` where it is one of `names`; raises ValueError that lists them and the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"There is no {what} {name!r}.{hint} Known are {', '.join(names)}.")
