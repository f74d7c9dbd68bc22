"""Layers of one input computed together: the numbers of the separate layers, by what rule, and what is kept."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear as TheirLoRALinear

from mlx_trainer.models.lora import LoRALinear, dropout_keys, project, shares_input
from mlx_trainer.models.products import kept
from mlx_trainer.models.quantized import dequantize_at_use
from mlx_trainer.state import random_state

INPUTS = 64
BASES = ("dense", "bias", "packed", "dequantized")


def normal(*shape: int, seed: int) -> mx.array:
    """Distinct float32 values."""
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def base(kind: str, outputs: int, seed: int = 0) -> Any:
    """A frozen layer, dense or of 4 bits."""
    linear = nn.Linear(INPUTS, outputs, bias=kind == "bias")
    linear.weight = normal(outputs, INPUTS, seed=seed) * INPUTS**-0.5
    if kind == "bias":
        linear.bias = normal(outputs, seed=seed + 1)
    if kind in ("packed", "dequantized"):
        linear = nn.QuantizedLinear.from_linear(linear, 32, 4)
    return (dequantize_at_use(linear) if kind == "dequantized" else linear).freeze()


def adapted(linear: Any, *, rank: int = 4, scale: float = 2.5, dropout: float = 0.0, seed: int = 0) -> LoRALinear:
    """An adapter that is not zero."""
    layer = LoRALinear(linear, rank=rank, scale=scale, dropout=dropout, key=mx.random.key(seed))
    layer.lora_b = normal(*layer.lora_b.shape, seed=seed + 2)
    return layer


@st.composite
def layers_of_one_input(draw: st.DrawFn) -> list[Any]:
    """One to four layers of any base, adapted or not, of any width, rank, scale and dropout."""
    layers = []
    for seed in range(draw(st.integers(1, 4))):
        layer = base(draw(st.sampled_from(BASES)), draw(st.sampled_from((1, 16, 40))), seed)
        if draw(st.booleans()):
            scale, dropout = draw(st.sampled_from((0.5, 1.0, 8.0))), draw(st.sampled_from((0.0, 0.05, 0.6)))
            layer = adapted(layer, rank=draw(st.integers(1, 5)), scale=scale, dropout=dropout, seed=seed)
        layers.append(layer.train(draw(st.sampled_from((True, True, False)))))
    return layers


@frozen(eq=False)
class Parts:
    """A layer as arrays: its dense weight, bias, adapter, and x's factors by dropout."""

    weight: mx.array
    bias: mx.array
    a: mx.array
    b: mx.array
    factors: mx.array

    @classmethod
    def of(cls, layer: Any, key: mx.array | None, x: mx.array) -> "Parts":
        """The parts of `layer`; without an adapter, one of zeros."""
        linear, adapter = (layer.linear, layer) if isinstance(layer, LoRALinear) else (layer, None)
        dense = linear.weight
        if "scales" in linear:
            dense = mx.dequantize(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits)
        a, b = mx.zeros((INPUTS, 1)), mx.zeros((1, len(dense)))
        factors = mx.ones(x.shape)
        if adapter is not None:
            a, b = adapter.lora_a, adapter.lora_b * adapter.scale
            if key is not None:
                mask, share = kept(x.shape, 1 - adapter.dropout._p_1, key)
                factors = mask / share
        return cls(dense, linear.bias if "bias" in linear else mx.zeros(len(dense)), a, b, factors)

    def __call__(self, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return x @ self.weight.T + self.bias + ((x * self.factors) @ a) @ b

    def absolute(self) -> "Parts":
        """The same with no sign, so that no sum cancels: what rounding is measured by."""
        return Parts(*map(mx.abs, (self.weight, self.bias, self.a, self.b, self.factors)))


def separately(x: mx.array, parts: Sequence[Parts], cotangents: Sequence[mx.array]) -> list[mx.array]:
    """Outputs, the gradient of x, and those of every a and b, as MLX differentiates each layer's own formula."""

    def outputs(x: mx.array, *adapters: mx.array) -> list[mx.array]:
        return [part(x, a, b) for part, a, b in zip(parts, adapters[::2], adapters[1::2], strict=True)]

    return differentiated(outputs, [x, *(array for part in parts for array in (part.a, part.b))], cotangents)


def differentiated(function: Callable[..., Any], primals: list[mx.array], cotangents: Any) -> list[mx.array]:
    """The outputs and gradients, in one list."""
    return [array for arrays in mx.vjp(function, primals, list(cotangents)) for array in arrays]


def together(x: mx.array, layers: Sequence[Any], keys: Any, cotangents: Sequence[mx.array]) -> list[mx.array]:
    """The same by `project`; a and b of layers without an adapter are stood in for by zeros."""

    def outputs(x: mx.array, *adapters: mx.array) -> list[mx.array]:
        for layer, a, b in zip(layers, adapters[::2], adapters[1::2], strict=True):
            if isinstance(layer, LoRALinear):
                layer.lora_a, layer.lora_b = a, b
        return list(project(x, *layers, keys=keys))

    originals = [
        (layer.lora_a, layer.lora_b)
        if isinstance(layer, LoRALinear)
        else (mx.zeros((INPUTS, 1)), mx.zeros((1, cotangent.shape[1])))
        for layer, cotangent in zip(layers, cotangents, strict=True)
    ]
    results = differentiated(outputs, [x, *(array for pair in originals for array in pair)], cotangents)
    for layer, (a, b) in zip(layers, originals, strict=True):
        if isinstance(layer, LoRALinear):
            layer.lora_a, layer.lora_b = a, b
    return results


def unscaled(results: Sequence[mx.array], layers: Sequence[Any]) -> list[mx.array]:
    """`separately`'s results with the gradients of b, which there includes the scale, as those of `lora_b`."""
    results = list(results)
    for i, layer in enumerate(layers):
        at = len(layers) + 2 + 2 * i
        if isinstance(layer, LoRALinear):
            results[at] = results[at] * layer.scale
        else:
            results[at - 1], results[at] = mx.zeros_like(results[at - 1]), mx.zeros_like(results[at])
    return results


def assert_same(x: mx.array, layers: Sequence[Any], keys: Any) -> None:
    """Every value and gradient to 1e-6 of the largest that it could be if nothing cancelled."""
    parts = [Parts.of(layer, key, x) for layer, key in zip(layers, keys, strict=True)]
    cotangents = [normal(len(x), len(part.weight), seed=9 + i) for i, part in enumerate(parts)]
    expected = unscaled(separately(x, parts, cotangents), layers)
    largest = unscaled(
        separately(mx.abs(x), [part.absolute() for part in parts], list(map(mx.abs, cotangents))), layers
    )
    for got, ideal, bound in zip(together(x, layers, keys, cotangents), expected, largest, strict=True):
        assert got.dtype == mx.float32
        assert mx.abs(got - ideal).max().item() <= 1e-6 * bound.max().item()


@given(layers_of_one_input(), st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=150, deadline=None, database=None)
def test_equals_the_separate_layers(layers: list[Any], positions: int, seed: int) -> None:
    """Values, and gradients of x and all adapters: any mix of layers, one position or many, dropout with its keys."""
    mx.random.seed(seed)
    assert_same(normal(positions, INPUTS, seed=seed), layers, dropout_keys(*layers))


QKV = ("dense", 48, 0.3), ("dequantized", 16, None), ("packed", 16, 0.0)


def qkv() -> list[Any]:
    """Three layers, two of them with an adapter, one of which drops."""
    return [
        base(kind, outputs, seed) if dropout is None else adapted(base(kind, outputs, seed), dropout=dropout, seed=seed)
        for seed, (kind, outputs, dropout) in enumerate(QKV)
    ]


def test_compiled_with_keys_drawn_inside_it_is_the_same() -> None:
    """Compiled or not, the same random state gives the same numbers, moves on alike, and the next call drops others."""
    mx.enable_compile()
    layers, x = qkv(), normal(40, INPUTS, seed=3)
    cotangents = [normal(40, outputs, seed=4) for _, outputs, _ in QKV]

    def step(x: mx.array) -> list[mx.array]:
        return together(x, layers, None, cotangents)

    runs = []
    for run in (step, mx.compile(step, inputs=mx.random.state, outputs=mx.random.state)):
        mx.random.seed(5)
        runs.append(([run(x), run(x)], random_state()))
        mx.eval(runs[-1])
    (plain, state), (compiled, compiled_state) = runs
    assert state == compiled_state
    for expected, actual in zip(plain, compiled, strict=True):
        for one, other in zip(expected, actual, strict=True):
            assert mx.abs(one - other).max().item() <= 2e-6 * mx.abs(one).max().item()
    assert mx.abs(plain[0][0] - plain[1][0]).max().item() > 0.1
    assert mx.array_equal(plain[0][1], plain[1][1]).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_activations(dtype: mx.Dtype) -> None:
    """Nothing but the adapters' gradients is float32, and every number is as near to exact as the separate layers'."""
    layers, x = [adapted(base("dense", outputs, outputs)) for outputs in (48, 16)], normal(40, INPUTS, seed=3)
    x = x.astype(dtype)
    for layer in layers:
        layer.linear.set_dtype(dtype)
    cotangents = [normal(40, outputs, seed=4).astype(dtype) for outputs in (48, 16)]

    def each(x: mx.array, *adapters: mx.array) -> list[mx.array]:
        for layer, a, b in zip(layers, adapters[::2], adapters[1::2], strict=True):
            layer.lora_a, layer.lora_b = a, b
        return [layer(x) for layer in layers]

    ours = together(x, layers, None, cotangents)
    adapters = [array for layer in layers for array in (layer.lora_a, layer.lora_b)]
    plain = differentiated(each, [x, *adapters], cotangents)
    for layer, a, b in zip(layers, adapters[::2], adapters[1::2], strict=True):
        layer.lora_a, layer.lora_b = a, b
        layer.linear.set_dtype(mx.float32)
    exact = together(x.astype(mx.float32), layers, None, [dy.astype(mx.float32) for dy in cotangents])
    assert [array.dtype for array in ours] == [dtype] * 3 + [mx.float32] * 4
    for got, theirs, ideal in zip(ours, plain, exact, strict=True):
        error, separate = (mx.abs(value.astype(mx.float32) - ideal).max().item() for value in (got, theirs))
        assert 0 < error <= 1.5 * separate + mx.finfo(dtype).eps * mx.abs(ideal).max().item()
    layers[0].dropout = nn.Dropout(0.3)
    layers[0].linear.set_dtype(dtype)
    some = together(x, layers[:1], None, cotangents[:1])
    assert [array.dtype for array in some] == [dtype] * 2 + [mx.float32] * 2


class Doubling(LoRALinear):
    """A layer of one's own."""

    def __call__(self, x: mx.array) -> mx.array:
        return 2 * super().__call__(x)


class OwnLinear(nn.Linear):
    """Another."""


def with_dropout(dropout: nn.Module) -> LoRALinear:
    """An adapter with another kind of dropout."""
    layer = adapted(base("dense", 16))
    layer.dropout = dropout
    return layer


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        *((base(kind, 16), True) for kind in BASES),
        *((adapted(base(kind, 16)), True) for kind in BASES),
        (base("dense", 16).unfreeze(), False),
        (base("bias", 16).unfreeze(keys="bias"), False),
        (adapted(base("dense", 16).unfreeze()), False),
        (Doubling(base("dense", 16), rank=2, scale=1.0, dropout=0.0, key=mx.random.key(0)), False),
        (adapted(OwnLinear(INPUTS, 16).freeze()), False),
        (with_dropout(nn.Identity()), False),
        (TheirLoRALinear.from_base(base("dense", 16)), False),
        (DoRALinear.from_base(base("dense", 16)), False),
    ],
)
def test_which_layers_are_computed_together(layer: Any, expected: bool) -> None:
    """Frozen ones of MLX's and our own classes; what is trained, or might compute something else, is asked itself."""
    assert shares_input(layer) == expected
    x = normal(5, INPUTS, seed=3)
    beside = base("dense", 16, seed=8)
    got, other = project(x, layer, beside)
    assert mx.array_equal(got, layer(x)).item() >= (not expected)
    assert mx.abs(got - layer(x)).max().item() <= 1e-5
    assert mx.array_equal(other, beside(x)).item()


def test_trained_weights_have_their_gradient() -> None:
    """Beside layers computed together, a trained one gets its own, and x the sum of all."""
    model = nn.Module()
    model.layers = [adapted(base("dense", 16)), base("dense", 48, seed=1).unfreeze(), base("dense", 16, seed=2)]
    x = normal(7, INPUTS, seed=3)

    def loss(way: Callable[[mx.array], Any]) -> Any:
        return nn.value_and_grad(model, lambda x: sum(mx.square(y).sum() for y in way(x)))(x)[1]["layers"]

    ours = loss(lambda x: project(x, *model.layers))
    plain = loss(lambda x: [layer(x) for layer in model.layers])
    for i, name in ((0, "lora_a"), (0, "lora_b"), (1, "weight")):
        one, other = ours[i][name], plain[i][name]
        assert mx.abs(one - other).max().item() <= 1e-5 * mx.abs(other).max().item() > 0


def test_keys_are_drawn_where_something_drops_and_nowhere_else() -> None:
    """Each dropping layer has a key of its own; without dropout, and in eval mode, the random state stays as it is."""
    first, bare, still = qkv()
    own = Doubling(base("dense", 16), rank=2, scale=1.0, dropout=0.5, key=mx.random.key(0))
    state = random_state()
    assert dropout_keys(bare, still, own) == (None, None, None)
    assert random_state() == state
    keys = dropout_keys(first, bare, first, still)
    assert [key is None for key in keys] == [False, True, False, True]
    assert keys[0].tolist() != keys[2].tolist() != dropout_keys(first)[0].tolist()
    assert (keys[0].shape, keys[0].dtype) == ((2,), mx.uint32)
    assert random_state() != state
    state = random_state()
    assert dropout_keys(first.eval()) == (None,)
    assert random_state() == state


@pytest.mark.parametrize("dropout", [0.05, 0.5, 1 - 1e-9])
def test_dropout_leaves_its_share(dropout: float) -> None:
    """Over half a million elements the share kept is the one that is told; two keys agree as often as chance has it."""
    shape = (641, 799)  # not a multiple of the four elements that a row of random bits is for
    one, other = (kept(shape, dropout, mx.random.key(seed)) for seed in (1, 2))
    share, size = one[1], 641 * 799
    assert share == pytest.approx(1 - dropout, abs=2**-16)
    deviation = (share * (1 - share) / size) ** 0.5
    for mask, _ in (one, other):
        assert (mask.shape, mask.dtype) == (shape, mx.bool_)
        assert abs(mask.mean().item() - share) <= 5 * deviation
    alike = share**2 + (1 - share) ** 2
    assert abs((one[0] == other[0]).mean().item() - alike) <= 5 * (alike * (1 - alike) / size) ** 0.5


def test_a_forward_pass_run_again_drops_the_same() -> None:
    """With keys drawn outside, `mx.checkpoint` gives the gradients bit for bit; drawn inside, it would not."""
    layers, x = qkv(), normal(40, INPUTS, seed=3)
    a, cotangents = layers[0].lora_a, [normal(40, outputs, seed=4) for _, outputs, _ in QKV]

    def outputs(x: mx.array, a: mx.array, keys: Any) -> list[mx.array]:
        layers[0].lora_a = a
        return list(project(x, *layers, keys=keys))

    def gradients(function: Callable[..., Any], keys: Any) -> list[mx.array]:
        mx.random.seed(2)
        return differentiated(lambda x, a: function(x, a, keys), [x, a], cotangents)

    keys = dropout_keys(*layers)
    again = mx.checkpoint(outputs)
    for one, other in zip(gradients(outputs, keys), gradients(again, keys), strict=True):
        assert mx.array_equal(one, other).item()
    assert not mx.array_equal(gradients(outputs, None)[-1], gradients(again, None)[-1]).item()


POSITIONS, WIDTH, RANK = 256, 256, 4
X_BYTES, LOW_BYTES, GRADIENT_BYTES = 4 * POSITIONS * WIDTH, 4 * POSITIONS * RANK, 2 * 4 * WIDTH * RANK


def peak_bytes(step: Callable[..., Any], x: mx.array) -> int:
    """What a step takes above what is held before it."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(x))
    return mx.get_peak_memory() - before


def growth_of_peak(way: Callable[..., Any], dropout: float, bits: int | None, compiled: bool) -> float:
    """Bytes by which the peak of forward and backward grows with each of 10 more pairs of layers of one input."""
    peaks, x = [], normal(POSITIONS, WIDTH, seed=3)
    for count in (20, 40):
        model = nn.Module()
        model.layers = []
        for seed in range(count):
            linear: Any = nn.Linear(WIDTH, WIDTH, bias=False)
            if bits is not None:
                linear = dequantize_at_use(nn.QuantizedLinear.from_linear(linear, 64, bits))
            model.layers.append(adapted(linear.freeze(), rank=RANK, dropout=dropout, seed=seed))

        def loss(x: mx.array, layers: list[Any] = model.layers) -> mx.array:
            for pair in zip(layers[::2], layers[1::2], strict=True):
                x = sum(way(x, *pair))
            return x.sum()

        step = nn.value_and_grad(model, loss)
        if compiled:
            state = [model.state, mx.random.state]
            step = mx.compile(step, inputs=state, outputs=state)
        mx.eval(model, step(x))
        peaks.append(min(peak_bytes(step, x) for _ in range(3)))  # how far the queue runs ahead differs by turn
    return (peaks[1] - peaks[0]) / 10


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_x_and_what_the_adapters_made_of_it_are_kept(dropout: float, bits: int | None, compiled: bool) -> None:
    """And a byte an element and adapter with dropout, where separate layers keep each dropped x; no dense weight."""
    mx.enable_compile()
    mask_bytes = X_BYTES // 4 if dropout else 0
    needed = X_BYTES + 2 * (mask_bytes + LOW_BYTES + GRADIENT_BYTES)
    assert growth_of_peak(project, dropout, bits, compiled) <= 1.5 * needed  # the queue's part differs by turn
    if dropout:
        assert growth_of_peak(lambda x, *layers: [layer(x) for layer in layers], dropout, bits, compiled) >= 2 * X_BYTES
