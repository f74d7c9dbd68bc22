"""Optimizers and schedules by name: their formulas, and what they refuse."""

import logging
import math

import mlx.core as mx
import pytest

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
