"""How AdaLoRA shares a budget of ranks (https://arxiv.org/abs/2303.10512, section 3.2), inside the compiled step.

An entry's importance is `|parameter * gradient|`, smoothed, times how much that varies; a rank's is that of its Λ plus
the means of its column and its row. Up to step `tinit` all ranks stay. Then the budget falls by a cubic law,

    budget(t) = target + (initial - target) * (1 - (t - tinit) / (T - tfinal - tinit))³

and every `deltaT` steps the Λ of the least important ranks are set to 0; they may grow again until the next time. At
step T - tfinal, T being the last, the ranks left are exactly the target's, `target_r` for each layer on average, and
then stay these. Step by step these are the rules of PEFT's `RankAllocator`, but that of equals only so many are left.
"""

from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
from attrs import astuple
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_trainer.config import AdaLoRAConfig
from mlx_trainer.models.error import ModelError

SINGULAR = "lora_e"
"""What an adapter's Λ is called."""


class RankAllocation(Optimizer):
    """Any optimizer, but after each update ranks beyond the budget of this step lose their Λ.

    `state["adalora"]` has the smoothed importance and its variation, like the parameters, and which ranks are left, a
    boolean each. Costs 8 bytes for each trained parameter, as the moments of Adam do, and in each step a sort of all
    ranks.
    """

    adalora: list[Any]
    """The constants of `AdaLoRAConfig`, by which a resumed run is compared."""
    _rules: tuple[AdaLoRAConfig, int]

    def init(self, parameters: Any) -> None:
        """Begin with importance 0 and all ranks."""
        super().init(parameters)
        zeros = {name: tree_map(mx.zeros_like, parameters) for name in ("importance", "variation")}
        named: dict[str, mx.array] = dict(tree_flatten(parameters))
        ranks = sum(named[f"{path}{SINGULAR}"].size for path in paths(named))
        self.state["adalora"] = {**zeros, "left": mx.ones(ranks, mx.bool_)}
        self._layers = len(paths(named))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Return the updated parameters, the pruned Λ among them 0."""
        updated, own = super().apply_gradients(gradients, parameters), self.state["adalora"]
        steps = mx.array(plan(*self._rules, initial=own["left"].size, layers=self._layers))
        budget, allocates, learns, final = steps[mx.minimum(self.step, len(steps) - 1).astype(mx.int32)]
        own |= smoothed(own, updated, gradients, self._rules[0], learns)
        own["left"] = mx.where(allocates, most_important(own, budget), own["left"])
        return masked(updated, own["left"] | ~(allocates | final).astype(mx.bool_))


def with_allocation(optimizer: Optimizer, adalora: AdaLoRAConfig, total_steps: int | None) -> Optimizer:
    """Return `optimizer`, now a `RankAllocation` as well; raises ModelError where the run has no room for it."""
    if total_steps is None or adalora.tinit >= total_steps - adalora.tfinal:
        raise ModelError(
            f"AdaLoRA takes ranks away from step tinit ({adalora.tinit}) to tfinal ({adalora.tfinal}) before the end, "
            f"and this run has {total_steps or 'no known number of'} steps; lower them, or set max_steps."
        )
    kind = type(optimizer)
    optimizer.__class__ = type(kind.__name__, (RankAllocation, kind), {})
    vars(optimizer).update(adalora=list(astuple(adalora)), _rules=(adalora, total_steps))
    return optimizer


@cache
def plan(adalora: AdaLoRAConfig, total_steps: int, *, initial: int, layers: int) -> list[list[int]]:
    """For each step from 0 to the last: the budget, and whether ranks are allocated, importance learns, it is over."""
    begin, end, target = adalora.tinit, total_steps - adalora.tfinal, (adalora.target_r or 0) * layers
    steps = []
    for step in range(total_steps + 1):
        left = 1 - (min(max(step, begin), end) - begin) / (end - begin)
        budget = int((initial - target) * left**3 + target)
        allocates = step == end or (begin < step < end and step % adalora.deltaT == 0)
        steps.append([budget, int(allocates), int(step < end), int(step > end)])
    return steps


def smoothed(own: Any, updated: Any, gradients: Any, adalora: AdaLoRAConfig, learns: mx.array) -> dict[str, Any]:
    """Importance and variation after a step whose parameters are `updated`; as they were where nothing `learns`."""

    def mean(old: mx.array, new: mx.array, beta: float) -> mx.array:
        return mx.where(learns, beta * old + (1 - beta) * new, old)

    now = tree_map(lambda p, g: mx.abs(p * g), updated, gradients)
    importance = tree_map(lambda old, new: mean(old, new, adalora.beta1), own["importance"], now)
    distance = tree_map(lambda new, smooth: mx.abs(new - smooth), now, importance)
    variation = tree_map(lambda old, new: mean(old, new, adalora.beta2), own["variation"], distance)
    return {"importance": importance, "variation": variation}


def most_important(own: Any, budget: mx.array) -> mx.array:
    """Which ranks are the `budget` most important ones of all layers, (ranks,) of booleans, in the order of names."""
    scores = dict(tree_flatten(tree_map(mx.multiply, own["importance"], own["variation"])))
    of_layers = [
        scores[f"{path}lora_e"][:, 0] + scores[f"{path}lora_a"].mean(axis=0) + scores[f"{path}lora_b"].mean(axis=1)
        for path in paths(scores)
    ]
    places = mx.argsort(mx.argsort(-mx.concatenate(of_layers)))
    return places < budget


def masked(parameters: Any, left: mx.array) -> Any:
    """`parameters` with those Λ 0 that are not `left`."""
    flat = dict(tree_flatten(parameters))
    names = [f"{path}{SINGULAR}" for path in paths(flat)]
    ends = list(accumulate(flat[name].size for name in names))
    for name, kept in zip(names, mx.split(left, ends[:-1]), strict=True):
        flat[name] = mx.where(kept[:, None], flat[name], 0)
    return tree_unflatten(list(flat.items()))


def paths(named: dict[str, mx.array]) -> list[str]:
    """The dotted prefixes of the layers that have a Λ, in order."""
    return sorted(name.removesuffix(SINGULAR) for name in named if name.endswith(SINGULAR))
