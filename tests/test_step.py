"""One optimizer update: its gradient, its guard, and what it leaves behind when something fails."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_trainer import LossOutput
from mlx_trainer.optim import OPTIMIZERS, build_optimizer
from mlx_trainer.step import StepContext, TrainStep, global_norm
from mlx_trainer.traced import nonfinite
from tests.toy import ToyBatch, ToyModule, toy_batches, weights, with_nan


def built(module: ToyModule, optimizer: optimizers.Optimizer | None = None, **options: Any) -> TrainStep:
    """A step of a module whose model is in place, dropout on."""
    module.setup("fit")
    optimizer = optimizer or module.configure_optimizer(None)
    optimizer.init(module.model.trainable_parameters())
    return TrainStep(module, optimizer, **options)


def optimizer_state(step: TrainStep) -> dict[str, Any]:
    return {name: array.tolist() for name, array in tree_flatten(step.optimizer.state)}


def finite(loss: mx.array, gradients: Any, context: StepContext) -> mx.array:
    """A guard as NaNGuard has it."""
    return mx.isfinite(loss) & mx.isfinite(context.grad_norm)


class Gradients(optimizers.Optimizer):
    """Keeps the gradients that it was given instead of using them."""

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        state["gradient"] = mx.zeros_like(parameter)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        state["gradient"] = gradient
        return parameter


def joined(batches: Sequence[ToyBatch]) -> ToyBatch:
    return ToyBatch(*(np.concatenate([getattr(b, name) for b in batches]) for name in ("x", "y", "weight")), None)


@pytest.mark.parametrize("sizes", [(4, 1), (3, 4, 2), (1, 1, 5, 2)])
def test_micro_batches_give_the_gradient_of_one_batch_of_all_their_rows(sizes: tuple[int, ...]) -> None:
    """K micro-batches of unequal rows and unequal weights: the mean over all their tokens, not a mean of means."""
    batches = toy_batches(sizes)
    several = built(ToyModule(dropout=0.0), Gradients(), accumulate=len(sizes))
    several(batches)
    one = built(ToyModule(dropout=0.0), Gradients())
    one([joined(batches)])

    expected, actual = dict(tree_flatten(one.optimizer.state)), dict(tree_flatten(several.optimizer.state))
    assert expected.keys() == actual.keys()
    for name in expected:
        largest = max(mx.abs(expected[name]).max().item(), 1e-12)
        assert mx.abs(expected[name] - actual[name]).max().item() <= 1e-6 * largest, name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_weights_are_those_of_a_raw_loop_bit_for_bit(accumulate: int) -> None:
    """Ten steps with dropout and AdamW end where the same loop written out by hand ends."""
    batches = toy_batches((4, 3) * 10)[: 10 * accumulate]
    module = ToyModule()
    step = built(module)
    step.accumulate = accumulate
    mx.random.seed(5)
    for i in range(0, len(batches), accumulate):
        step(batches[i : i + accumulate])

    assert weights(module) == raw_loop(batches, accumulate)


def raw_loop(batches: Sequence[ToyBatch], accumulate: int) -> dict[str, Any]:
    """What one would write without a trainer, uncompiled."""
    module = ToyModule()
    module.setup("fit")
    model, optimizer = module.model, module.configure_optimizer(None)

    def loss(x: mx.array, y: mx.array, weight: mx.array) -> mx.array:
        return (mx.square(model(x)[:, 0] - y) * weight).sum()

    mx.random.seed(5)
    for i in range(0, len(batches), accumulate):
        total: dict[str, mx.array] = {}
        tokens = mx.array(0.0)
        for batch in batches[i : i + accumulate]:
            arrays = mx.array(batch.x), mx.array(batch.y), mx.array(batch.weight)
            _, gradients = nn.value_and_grad(model, loss)(*arrays)
            tokens += arrays[2].sum()
            total = {name: total.get(name, 0) + g for name, g in tree_flatten(gradients)}
        from mlx.utils import tree_unflatten

        optimizer.update(model, tree_unflatten([(name, g / tokens) for name, g in total.items()]))
        mx.eval(model.parameters(), optimizer.state)
    return weights(module)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_batch_leaves_parameters_and_optimizer_state_bit_identical(accumulate: int, name: str) -> None:
    """The guarded update is not made, the optimizer's step counter included, and the next step trains."""
    good, bad = toy_batches((4, 3)), [with_nan(batch) for batch in toy_batches((4, 3), seed=1)]
    module = ToyModule()
    optimizer = build_optimizer(name, 0.01, schedule="linear", total_steps=10)
    step = built(module, optimizer, accumulate=accumulate, guards={"finite": finite})

    accepted = [step(good[:accumulate]).verdicts["finite"]]
    before = weights(module), optimizer_state(step)
    accepted.append(step(bad[:accumulate]).verdicts["finite"])
    around = weights(module), optimizer_state(step)
    accepted.append(step(good[:accumulate]).verdicts["finite"])

    assert around == before
    assert weights(module) != before[0]
    assert [a.item() for a in accepted] == [True, False, True]


def test_without_a_guard_a_nan_is_not_hidden() -> None:
    """The loss that a poisoned batch really has is what is reported."""
    step = built(ToyModule())
    output = step([with_nan(toy_batches((3,))[0])])
    assert np.isnan(output.total.item())
    assert output.verdicts == {}


def test_a_batch_without_any_weight_changes_nothing_with_plain_gradient_descent() -> None:
    """Zero trained tokens are a gradient of zero, not 0/0."""
    (batch,) = toy_batches((3,))
    empty = ToyBatch(batch.x, batch.y, batch.weight * 0, None)
    module = ToyModule()
    step = built(module, optimizers.SGD(0.1))
    before = weights(module)
    step([empty])
    assert weights(module) == before


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_error_while_tracing_leaves_a_state_that_continues_bit_for_bit(accumulate: int) -> None:
    """The loss fails on a new shape; afterwards the run goes on as if that batch had not been there."""

    class Fails(ToyModule):
        def training_loss(self, batch: ToyBatch) -> LossOutput:
            output = super().training_loss(batch)
            if batch.x.shape[0] == 5:
                raise KeyboardInterrupt
            return output

    good, bad = toy_batches((4, 4)), toy_batches((4, 5), seed=1)[-accumulate:]
    results = []
    for disturbed in (False, True):
        module = Fails()
        step = built(module, accumulate=accumulate)
        mx.random.seed(3)
        step(good[:accumulate])
        if disturbed:
            with pytest.raises(KeyboardInterrupt):
                step(bad)
        # With accumulation the first of the failed window's micro-batches was drawn for; its randomness is taken back.
        step(good[:accumulate])
        results.append((weights(module), optimizer_state(step)))

    assert results[0] == results[1]


def test_each_shape_is_traced_once() -> None:
    """Five windows of two shapes, full and short, trace the loss twice."""

    class Counting(ToyModule):
        traces = 0

        def training_loss(self, batch: ToyBatch) -> LossOutput:
            Counting.traces += 1
            return super().training_loss(batch)

    step = built(Counting(), accumulate=2)
    for sizes in ((4, 4), (4, 3), (3, 3), (3, 4), (4,)):
        step(toy_batches(sizes))

    assert (Counting.traces, step.compiled_shapes) == (2, 2)


def test_the_global_norm_is_computed_in_float32() -> None:
    """Squares that overflow float16 do not overflow the norm, and many small ones are not lost."""
    gradients = {"a": mx.full((3,), 300.0, mx.float16), "b": [mx.full((40_000,), 1e-3, mx.float16)]}
    expected = np.sqrt(3 * 300.0**2 + 40_000 * float(np.float16(1e-3)) ** 2)

    norm = global_norm(gradients)

    assert norm.dtype == mx.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert global_norm({"small": gradients["b"]}).item() == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_what_is_not_finite_is_named(dtype: mx.Dtype) -> None:
    """NaN and both infinities, in arrays of any size; the largest finite number is none, nor are integers."""
    largest = {mx.float16: 65504.0, mx.bfloat16: 3.38e38, mx.float32: 3.4e38}[dtype]
    values = {"usual": [1.0, -2.0, 0.0], "largest": [[largest], [-largest]], "none": []}
    bad = {"nan": [0.0, math.nan], "inf": math.inf, "-inf": [[-math.inf, 1.0]]}
    tree = {name: mx.array(value, dtype) for name, value in (values | bad).items()}
    assert nonfinite([tree, {"integers": mx.array([2**31 - 1])}]) == [f"0.{name}" for name in bad]


def test_half_precision_parameters_keep_their_type() -> None:
    """Gradients are averaged in float32 and given to the optimizer in the parameter's own type."""
    module = ToyModule()
    module.setup("fit")
    module.model.set_dtype(mx.bfloat16)
    step = built(module, accumulate=2)
    step(toy_batches((4, 3)))
    assert {array.dtype for _, array in tree_flatten(module.model.parameters())} == {mx.bfloat16}


class Average:
    """An average of the parameters over the accepted steps, as a callback would keep it."""

    def __init__(self, module: ToyModule) -> None:
        self.arrays = {"average": module.model.trainable_parameters(), "steps": mx.array(0)}

    def update(self, arrays: dict[str, Any], parameters: Any, context: StepContext) -> dict[str, Any]:
        average = tree_map(lambda a, p: 0.75 * a + 0.25 * p, arrays["average"], parameters)
        return {"average": average, "steps": arrays["steps"] + 1}


def averaging(module: ToyModule, accumulate: int, **options: Any) -> tuple[TrainStep, Average]:
    """A guarded step that keeps an average."""
    module.setup("fit")
    average = Average(module)
    traced = {"updates": {"average": average.update}, "arrays": {"average": average.arrays}}
    return built(module, accumulate=accumulate, guards={"finite": finite}, **traced, **options), average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_arrays_of_callbacks_follow_accepted_updates_only(accumulate: int) -> None:
    """The average is that of the parameters after each good step; a refused step leaves it bit for bit."""
    module = ToyModule()
    step, average = averaging(module, accumulate)
    expected = {name: np.array(array) for name, array in tree_flatten(average.arrays["average"])}
    for seed in range(6):
        batches = toy_batches((4, 3)[:accumulate], seed)
        before = [array.tolist() for _, array in tree_flatten(average.arrays)]
        if seed in (2, 3):
            step([with_nan(batch) for batch in batches])
            assert [array.tolist() for _, array in tree_flatten(average.arrays)] == before
            continue
        step(batches)
        new = dict(tree_flatten(module.model.trainable_parameters()))
        expected = {name: 0.75 * array + 0.25 * np.array(new[name]) for name, array in expected.items()}

    actual = dict(tree_flatten(average.arrays["average"]))
    assert average.arrays["steps"].item() == 4
    for name, array in expected.items():
        np.testing.assert_allclose(np.array(actual[name]), array, rtol=1e-5, atol=1e-7)


def test_arrays_of_callbacks_survive_an_error_while_tracing() -> None:
    """As parameters do: what failed leaves no trace in them."""

    class Fails(ToyModule):
        def training_loss(self, batch: ToyBatch) -> LossOutput:
            if batch.x.shape[0] == 5:
                raise RuntimeError("no")
            return super().training_loss(batch)

    def broken(gradients: Any, context: StepContext) -> Any:
        if Broken.armed:
            raise RuntimeError("no")
        return gradients, {}

    class Broken:
        armed = False

    step, average = averaging(Fails(), 1, transforms=[broken])
    step(toy_batches((4,)))
    before = [array.tolist() for _, array in tree_flatten(average.arrays)]
    for rows, Broken.armed in ((5, False), (3, True)):
        with pytest.raises(RuntimeError, match="no"):
            step(toy_batches((rows,)))
        assert [array.tolist() for _, array in tree_flatten(average.arrays)] == before
        assert step.sound


def test_an_update_waits_for_the_next_step(tmp_path: Path) -> None:
    """It is dispatched when that is made, or by `close`; its numbers are the same."""
    module = ToyModule()
    step = built(module)

    def waiting() -> list[Any]:
        mx.export_to_dot(str(tmp_path / "graph"), *[array for _, array in tree_flatten(step.optimizer.state)])
        return re.findall(r"shape=rectangle", (tmp_path / "graph").read_text())

    batches = toy_batches((4, 4))
    step(batches[:1])
    first = len(waiting())
    step(batches[1:])
    assert 0 < len(waiting()) <= first  # its own alone
    step.close()
    assert waiting() == []
