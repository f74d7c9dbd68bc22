"""Optimizers and schedules by name: their formulas, and what they refuse."""

import logging
import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from mlx.optimizers import Optimizer

from mlx_trainer.optim import OPTIMIZERS, SCHEDULES, build_optimizer, build_schedule

PEAK, TOTAL, WARMUP = 2e-3, 20, 5


def rates_of_run(steps: int, **arguments: object) -> list[float]:
    """The learning rate that each of `steps` updates really used."""
    optimizer = build_optimizer("sgd", PEAK, weight_decay=0.0, **arguments)  # type: ignore[arg-type]
    weights, rates = {"w": mx.zeros(2)}, []
    for _ in range(steps):
        before = weights["w"][0].item()
        weights = optimizer.apply_gradients({"w": mx.ones(2)}, weights)
        rates.append(before - weights["w"][0].item())
    return rates


@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_cosine_follows_its_formula_at_every_step(minimum: float) -> None:
    """Each update uses the closed formula's rate: (k + 1) / W, then a half cosine to the minimum."""
    expected = [PEAK * (k + 1) / WARMUP for k in range(WARMUP)]
    for k in range(WARMUP, TOTAL + 3):
        progress = min((k - WARMUP) / (TOTAL - WARMUP), 1.0)
        expected.append(PEAK * (minimum + (1 - minimum) * (1 + math.cos(math.pi * progress)) / 2))
    actual = rates_of_run(TOTAL + 3, schedule="cosine", total_steps=TOTAL, warmup_steps=WARMUP, minimum_ratio=minimum)
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert min(actual[0], actual[TOTAL - 1]) > 0


def test_linear_falls_evenly() -> None:
    """Without a warm-up the first update has the whole rate and each later one 1/total less."""
    actual = rates_of_run(TOTAL, schedule="linear", total_steps=TOTAL)
    assert actual == pytest.approx([PEAK * (1 - k / TOTAL) for k in range(TOTAL)], rel=1e-3)


def test_constant_needs_no_end() -> None:
    """A run without a known length warms up and then stays."""
    expected = [PEAK / 2, PEAK, PEAK, PEAK]
    assert rates_of_run(4, schedule="constant", total_steps=None, warmup_steps=2) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_decay_without_an_end_is_refused(schedule: str) -> None:
    """A decaying schedule says what it is missing instead of guessing."""
    with pytest.raises(ValueError, match=f"{schedule} schedule must know its end"):
        build_optimizer("adamw", PEAK, schedule=schedule)


def test_a_warmup_as_long_as_the_run_is_shortened(caplog: pytest.LogCaptureFixture) -> None:
    """A warm-up of 100 in a run of 20 takes 2 updates and says so."""
    with caplog.at_level(logging.WARNING, "mlx_trainer.optim"):
        rate = build_schedule("cosine", PEAK, TOTAL, 100)
    assert [rate(mx.array(k)).item() for k in (0, 1, 2)] == pytest.approx([PEAK / 2, PEAK, PEAK])
    assert caplog.messages == ["A warm-up of 100 steps does not fit a run of 20; it takes 2."]


def test_adamw_equals_the_paper_with_bias_correction() -> None:
    """Two updates of AdamW equal Loshchilov and Hutter's algorithm 2, written out in Python floats."""
    optimizer = build_optimizer("adamw", 0.1, weight_decay=0.05, betas=(0.8, 0.9))
    weights, expected, m, v = {"w": mx.array([2.0])}, 2.0, 0.0, 0.0
    for t, gradient in enumerate((0.3, -1.7), start=1):
        weights = optimizer.apply_gradients({"w": mx.array([gradient])}, weights)
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        moved = (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-8)
        expected = expected * (1 - 0.1 * 0.05) - 0.1 * moved
    assert weights["w"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_adamw_is_mlxs_own_with_bias_correction(dtype: mx.Dtype) -> None:
    """Ten updates with a changing rate, the moments bit for bit, parameters but for roundings and in their own type."""
    rate = build_schedule("cosine", 0.01, 10, 3)
    ours = build_optimizer("adamw", 0.01, schedule="cosine", total_steps=10, warmup_steps=3, weight_decay=0.1)
    ends = []
    for optimizer in (ours, optimizers.AdamW(rate, betas=[0.9, 0.999], weight_decay=0.1, bias_correction=True)):
        weights = {"w": mx.random.normal((8, 8), key=mx.random.key(0)).astype(dtype)}
        for t in range(10):
            gradients = {"w": mx.random.normal((8, 8), key=mx.random.key(t + 1)).astype(dtype)}
            weights = optimizer.apply_gradients(gradients, weights)
        ends.append((weights["w"], optimizer.state["w"]["m"], optimizer.state["w"]["v"]))
    (own, *moments), (mlxs, *expected) = ends
    assert own.dtype == mlxs.dtype == dtype
    assert mx.allclose(own, mlxs, rtol=1e-6 if dtype == mx.float32 else 2**-6, atol=1e-8).item()
    assert all(mx.array_equal(*pair).item() for pair in zip(moments, expected, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adamw_leaves_everything_as_it_is_where_an_update_is_refused(bad: float) -> None:
    """Bit for bit, zeros that are negative too."""
    optimizer = build_optimizer("adamw", 0.1)
    weights = optimizer.apply_gradients({"w": mx.array([1.0, -1.0, 1.0])}, {"w": mx.array([1.0, 2.0, 3.0])})
    optimizer.state["w"] |= {"m": mx.array([-0.0, 0.0, 1e-40]), "v": mx.array([0.0, 1e-30, 2.0])}
    before = weights["w"], *optimizer.state["w"].values()
    optimizer.accepted = mx.array(False)
    weights = optimizer.apply_gradients({"w": mx.array([bad, 1.0, -1.0])}, weights)
    after = weights["w"], *optimizer.state["w"].values()
    assert [a.view(mx.uint32).tolist() for a in after] == [b.view(mx.uint32).tolist() for b in before]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pair_descends(name: str, schedule: str) -> None:
    """Each optimizer under each schedule brings |w|^2 down in 30 updates."""
    optimizer = build_optimizer(name, 0.02, schedule=schedule, total_steps=30, warmup_steps=3, weight_decay=0.0)
    weights = {"w": mx.array([[1.0, -0.5], [0.25, 0.75]])}
    start = mx.square(weights["w"]).sum().item()
    for _ in range(30):
        weights = optimizer.apply_gradients({"w": 2 * weights["w"]}, weights)
    assert mx.square(weights["w"]).sum().item() < 0.9 * start


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "muon"])
def test_weight_decay_is_used(name: str) -> None:
    """A larger weight decay gives other weights than none."""
    ends = []
    for decay in (0.0, 0.5):
        optimizer = build_optimizer(name, 0.1, weight_decay=decay)
        ends.append(optimizer.apply_gradients({"w": mx.full((2, 2), 0.5)}, {"w": mx.array([[1.0, 2.0], [3.0, 1.0]])}))
    assert not mx.allclose(ends[0]["w"], ends[1]["w"], atol=1e-4).item()


def test_adam_says_that_it_does_not_decay(caplog: pytest.LogCaptureFixture) -> None:
    """The one optimizer that has no weight decay does not ignore it in silence."""
    build_optimizer("adam", PEAK, weight_decay=0.01)
    assert caplog.messages == ["adam has no weight decay, so 0.01 is not used; adamw has."]


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_betas_give_the_momentum(name: str) -> None:
    """The first of `betas` is the momentum of the optimizers that have one moment."""
    assert build_optimizer(name, PEAK, betas=(0.7, 0.9)).momentum == 0.7


def test_unknown_names_are_refused_with_the_nearest() -> None:
    """A misspelt optimizer or schedule is named, with the one that was meant and all there are."""
    with pytest.raises(ValueError, match=r"no optimizer 'adamww'\. Did you mean adamw\? Known are adamw, adam, sgd"):
        build_optimizer("adamww", PEAK)
    with pytest.raises(ValueError, match=r"no schedule 'cosin'\. Did you mean cosine\?"):
        build_optimizer("adamw", PEAK, schedule="cosin")
    with pytest.raises(ValueError, match="must be above 0, not 0"):
        build_optimizer("adamw", 0.0)


def layer(seed: int) -> dict[str, Any]:
    """Random arrays under the names of an adapted layer's parameters, one of them a vector as DoRA's magnitudes are."""
    shapes = {"lora_a": (6, 2), "lora_b": (2, 5), "m": (5,)}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {
        "layers": [
            {},
            {name: mx.random.normal(shape, key=key) for key, (name, shape) in zip(keys, shapes.items(), strict=True)},
        ]
    }


def moved(optimizer: Optimizer, updates: int = 1) -> dict[str, mx.array]:
    """How far each parameter is from its start after so many updates with other gradients each."""
    start = weights = layer(0)
    for number in range(1, 1 + updates):
        weights = optimizer.apply_gradients(layer(number), weights)
    return {name: weights["layers"][1][name] - value for name, value in start["layers"][1].items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loraplus_moves_lora_b_by_its_ratio(name: str) -> None:
    """Of each optimizer the first update of lora_b, decay included, is 16 times as large, that of lora_a as it was."""
    plain, plus = (moved(build_optimizer(name, 1e-3, weight_decay=0.1, loraplus_lr_ratio=r)) for r in (None, 16.0))
    assert mx.array_equal(plus["lora_a"], plain["lora_a"]).item()
    for each in ("lora_b", "m"):
        assert mx.allclose(plus[each], 16 * plain[each], rtol=1e-3, atol=2e-6).item()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loraplus_is_two_optimizers_of_two_rates(name: str) -> None:
    """Under a schedule, bit for bit an optimizer at the rate for lora_a and another at 4 times that for lora_b."""
    common = {"schedule": "cosine", "total_steps": 5, "warmup_steps": 2, "weight_decay": 0.1}
    slow, fast = moved(build_optimizer(name, 2**-10, **common), 5), moved(build_optimizer(name, 2**-8, **common), 5)
    plus = moved(optimizer := build_optimizer(name, 2**-10, **common, loraplus_lr_ratio=4.0), 5)
    assert mx.array_equal(plus["lora_a"], slow["lora_a"]).item()
    assert mx.array_equal(plus["lora_b"], fast["lora_b"]).item()
    assert optimizer.step.item() == 5
    assert optimizer.learning_rate.item() == build_schedule("cosine", 2**-10, 5, 2)(mx.array(4)).item()


def test_loraplus_is_torchs_adamw_with_the_groups_of_peft() -> None:
    """Three updates with decay give the parameters of torch's AdamW with two groups, to rounding."""
    torch = pytest.importorskip("torch", reason="torch computes the reference; it is in the test extra")
    ours = moved(build_optimizer("adamw", 1e-2, weight_decay=0.1, loraplus_lr_ratio=8.0), 3)
    start = {name: torch.tensor(value.tolist()) for name, value in layer(0)["layers"][1].items()}
    theirs = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [
        {"params": [theirs["lora_a"]], "lr": 1e-2},
        {"params": [theirs["lora_b"], theirs["m"]], "lr": 8e-2},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for number in (1, 2, 3):
        for name, gradient in layer(number)["layers"][1].items():
            theirs[name].grad = torch.tensor(gradient.tolist())
        optimizer.step()
    for name, value in theirs.items():
        assert (value - start[name]).detach().flatten().tolist() == pytest.approx(
            ours[name].flatten().tolist(), abs=1e-5
        )


def test_loraplus_refuses_a_ratio_that_is_none() -> None:
    """Zero would freeze lora_b, and is told."""
    with pytest.raises(ValueError, match="loraplus_lr_ratio is 0; it must be above 0"):
        build_optimizer("adamw", PEAK, loraplus_lr_ratio=0)
