"""AdaLoRA's budget: PEFT's allocator step by step, and exactly met where importance says nothing."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attrs import evolve
from mlx.optimizers import Optimizer

from mlx_trainer.config import AdaLoRAConfig
from mlx_trainer.models import ModelError
from mlx_trainer.models.rank_allocation import plan, with_allocation
from mlx_trainer.optim import build_optimizer

RULES = AdaLoRAConfig(target_r=2, tinit=2, tfinal=3, deltaT=2)
STEPS, RATE, SHAPES = 12, 0.1, {"first": (6, 4, 5), "second": (5, 3, 7)}


def tree(seed: int) -> dict[str, Any]:
    """Two layers of other sizes and ranks, (in, rank, out), of random numbers."""
    random = np.random.default_rng(seed)

    def drawn(*shape: int) -> mx.array:
        return mx.array(random.normal(size=shape).astype(np.float32))

    return {
        name: {"lora_a": drawn(inputs, rank), "lora_e": drawn(rank, 1), "lora_b": drawn(rank, outputs)}
        for name, (inputs, rank, outputs) in SHAPES.items()
    }


def allocating(rules: AdaLoRAConfig = RULES, **options: Any) -> Optimizer:
    """Plain gradient descent that allocates ranks in a run of 12 steps."""
    return with_allocation(build_optimizer("sgd", RATE, weight_decay=0.0, **options), rules, STEPS)


def singular(weights: dict[str, Any]) -> list[float]:
    """Λ of both layers, one behind the other."""
    return [value for name in SHAPES for (value,) in weights[name]["lora_e"].tolist()]


@pytest.mark.parametrize(
    "rules", [RULES, evolve(RULES, tfinal=0, deltaT=1), evolve(RULES, beta1=0.5, beta2=0.7, tinit=0)]
)
def test_each_step_is_that_of_pefts_allocator(rules: AdaLoRAConfig) -> None:
    """Λ after each of 12 updates, with random gradients, is what PEFT's rules make of it."""
    torch: Any = pytest.importorskip("torch", reason="the reference is PEFT's own code, on torch")
    pytest.importorskip("peft", reason="the reference is PEFT's own code")
    from peft.tuners.adalora.layer import RankAllocator
    from peft.tuners.adalora.model import AdaLoraModel

    model = torch.nn.Module()
    for layer, values in tree(0).items():
        for name, value in values.items():
            turned = value.T if name != "lora_e" else value
            model.register_parameter(
                f"{layer}_{name[:5]}{name[5].upper()}", torch.nn.Parameter(torch.tensor(np.array(turned)))
            )
    # PEFT looks for `lora_A.<adapter>` in the names, which a parameter may not have.
    named = [(name.replace("_lora", ".lora") + ".default", value) for name, value in model.named_parameters()]
    model.named_parameters = lambda: named
    names = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")
    settings = SimpleNamespace(**{name: getattr(rules, name) for name in names}, total_step=STEPS, rank_pattern=None)
    allocator = RankAllocator(model, settings, "default")
    peft = SimpleNamespace(
        model=model, peft_config={"default": settings}, trainable_adapter_name="default", rankallocator=allocator
    )
    weights, optimizer = tree(0), allocating(rules)
    for step in range(1, STEPS + 1):
        gradients = tree(step)
        weights = optimizer.apply_gradients(gradients, weights)
        for name, value in named:
            layer, ours = name.split(".")[:2]
            gradient = np.array(gradients[layer][ours.lower()])
            value.grad = torch.tensor(gradient if ours == "lora_E" else gradient.T)
            value.data -= RATE * value.grad
        AdaLoraModel.update_and_allocate(peft, step)
        theirs = [x for layer in SHAPES for x in dict(named)[f"{layer}.lora_E.default"].flatten().tolist()]
        assert singular(weights) == pytest.approx(theirs, abs=1e-6), step
    assert np.count_nonzero(theirs) == 4


@pytest.mark.parametrize("tfinal", [0, 3])
def test_the_budget_is_met_exactly_although_all_are_alike(tfinal: int) -> None:
    """Gradients of zero make every importance 0; even so 4 of 7 ranks are left from step T - tfinal on."""
    optimizer, weights, left = allocating(evolve(RULES, tfinal=tfinal, deltaT=1)), tree(0), []
    zeros = {name: {part: mx.zeros_like(value) for part, value in own.items()} for name, own in weights.items()}
    for _ in range(STEPS):
        weights = optimizer.apply_gradients(zeros, weights)
        left.append(np.nonzero(singular(weights))[0].tolist())
    assert [len(each) for each in left[: RULES.tinit]] == [7, 7]
    assert sorted(map(len, left), reverse=True) == list(map(len, left))
    assert [each for each in left[STEPS - tfinal - 1 :] if each != left[-1]] == []
    assert len(left[-1]) == 4


def test_pruned_ranks_stay_out_at_the_end_and_may_come_back_before() -> None:
    """Between two allocations Λ grows again; in the last `tfinal` steps it is 0 after every update."""
    optimizer, weights, counts = allocating(evolve(RULES, tinit=0, deltaT=4)), tree(0), []
    for step in range(1, STEPS + 1):
        weights = optimizer.apply_gradients(tree(step), weights)
        counts.append(np.count_nonzero(singular(weights)))
    assert (counts[3] < 7, counts[4:7], counts[8:]) == (True, [7, 7, 7], [4, 4, 4, 4])


def test_the_plan_is_the_cubic_law() -> None:
    """Budgets between tinit and the end are those of the formula, cut to whole ranks; each key moves its own part."""
    budgets = [row[0] for row in plan(RULES, STEPS, initial=20, layers=2)]
    assert budgets == [20, 20, 20] + [int(16 * (1 - (t - 2) / 7) ** 3 + 4) for t in range(3, 10)] + [4, 4, 4]

    def steps(column: int, **changes: int) -> list[int]:
        rows = plan(evolve(RULES, **changes), STEPS, initial=20, layers=2)
        return [step for step, row in enumerate(rows) if row[column]]

    assert steps(1) == [4, 6, 8, 9]
    assert steps(1, deltaT=3) == [3, 6, 9]
    assert steps(1, tinit=5) == [6, 8, 9]
    assert steps(3) == [10, 11, 12]
    assert steps(3, tfinal=1) == [12]


def test_loraplus_goes_with_it() -> None:
    """Ranks are allocated whatever the optimizer is, and lora_b keeps its own rate."""
    plus, plain = allocating(loraplus_lr_ratio=4.0), allocating()
    moved = [optimizer.apply_gradients(tree(1), tree(0))["first"] for optimizer in (plus, plain)]
    start = tree(0)["first"]
    assert mx.allclose(
        moved[0]["lora_b"] - start["lora_b"], 4 * (moved[1]["lora_b"] - start["lora_b"]), atol=1e-5
    ).item()
    assert mx.array_equal(moved[0]["lora_e"], moved[1]["lora_e"]).item()


@pytest.mark.parametrize("total", [None, 5])
def test_a_run_without_room_for_it_is_refused(total: int | None) -> None:
    """It must have an end, and steps between tinit and tfinal."""
    with pytest.raises(ModelError, match=f"this run has {total or 'no known number of'} steps"):
        with_allocation(build_optimizer("adamw", RATE), RULES, total)
