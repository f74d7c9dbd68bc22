"""The members of LoRA's family: what each computes, where it starts, and that its option changes just that."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attrs import evolve
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.dora import DoRALinear as TheirDoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora import (
    DoRALinear,
    LoRALinear,
    adapted_layers,
    dropout_keys,
    factors,
    inject_lora,
    project,
    trainable,
)
from mlx_trainer.models.lora.initialisation import largest_part, olora, pissa
from mlx_trainer.models.lora.layers import dense_weight
from mlx_trainer.models.quantized import dequantize_at_use
from mlx_trainer.state import random_state

INPUTS, OUTPUTS = 64, 48
BASES = ("dense", "bias", "4-bit", "3-bit", "dequantized")
MEMBERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa and dora": {"init_lora_weights": "pissa", "use_dora": True},
}
LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=["linear"])


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Distinct float32 values."""
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


class Model(nn.Module):
    """One layer by name, in one block."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = [nn.Module()]
        self.layers[0].linear = layer

    def __call__(self, *inputs: mx.array) -> mx.array:
        return self.layers[0].linear(*inputs)


def base(kind: str = "dense", seed: int = 0) -> Any:
    """A frozen linear layer, dense or packed."""
    linear = nn.Linear(INPUTS, OUTPUTS, bias=kind == "bias")
    linear.weight = normal(OUTPUTS, INPUTS, seed=seed) * INPUTS**-0.5
    if kind == "bias":
        linear.bias = normal(OUTPUTS, seed=seed + 1)
    bits = {"4-bit": 4, "3-bit": 3, "dequantized": 4}.get(kind)
    layer = linear if bits is None else nn.QuantizedLinear.from_linear(linear, 32, bits)
    return (dequantize_at_use(layer) if kind == "dequantized" else layer).freeze()


def adapted(lora: LoRAConfig, layer: Any = None) -> Any:
    """The layer with its adapter, as it starts."""
    return inject_lora(Model(base() if layer is None else layer), lora, seed=3).layers[0].linear


def moved(layer: Any, seed: int = 5) -> Any:
    """The same after some training: nothing is where it started."""
    for i, (name, value) in enumerate(sorted(trainable(layer).items())):
        layer[name] = value + normal(*value.shape, seed=seed + i) * 0.2
    return layer


def member(name: str, kind: str = "dense", **options: Any) -> Any:
    """A member of the family on a base of a kind."""
    return adapted(evolve(LORA, **MEMBERS[name], **options), base(kind))


def distance(actual: mx.array, expected: mx.array) -> float:
    """The largest difference, in units of the largest expected value."""
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


def gradients(layer: nn.Module, way: Callable[[mx.array], mx.array], x: mx.array) -> dict[str, mx.array]:
    """Those of what trains, with distinct cotangents; and the output."""
    weights = normal(*x.shape[:-1], OUTPUTS, seed=9)
    value, found = nn.value_and_grad(layer, lambda x: (way(x) * weights).sum())(x)
    return {"loss": value, "y": way(x)} | {name: found[name] for name in trainable(layer)}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", MEMBERS)
def test_it_starts_at_the_base_layers_output(name: str, kind: str) -> None:
    """To 1e-5, in training with dropout too; and the base's own arrays are untouched."""
    layer, untouched = member(name, kind, dropout=0.5), base(kind)
    x = normal(2, 5, INPUTS, seed=1)
    assert distance(layer.train()(x), untouched(x)) <= 1e-5
    assert all(mx.array_equal(layer.linear[key], value).item() for key, value in untouched.parameters().items())
    assert distance(moved(layer)(x), untouched(x)) > 0.05


def test_the_scale_is_alpha_by_rank_or_by_its_root() -> None:
    """rsLoRA's adapter adds √rank times as much as LoRA's; alpha and rank do what the formula says."""
    x, plain = normal(3, INPUTS, seed=1), base()(normal(3, INPUTS, seed=1))

    def added(**options: Any) -> mx.array:
        layer = adapted(evolve(LORA, **options))
        layer.lora_b = mx.ones(layer.lora_b.shape)
        return layer(x) - plain

    assert distance(added(use_rslora=True), 2 * added()) <= 1e-5
    assert distance(added(alpha=16), 2 * added()) <= 1e-5
    assert adapted(evolve(LORA, rank=8)).lora_a.shape == (INPUTS, 8)
    assert adapted(evolve(LORA, rank=8)).scale == 1
    assert adapted(evolve(LORA, rank=16, use_rslora=True)).scale == 2


def test_dropout_drops_in_training_alone() -> None:
    """At 0.5 two calls differ in training and agree in eval mode; at 0 they always agree."""
    x = normal(3, INPUTS, seed=1)
    for name in MEMBERS:
        some, none = moved(member(name, dropout=0.5)), moved(member(name))
        assert distance(some(x), some(x)) > 0.01
        assert mx.array_equal(some.eval()(x), some(x)).item()
        assert mx.array_equal(none(x), none(x)).item()
        assert distance(some(x), none(x)) <= 1e-6


@pytest.mark.parametrize(
    "kind", [kind for kind in BASES if kind != "3-bit"]
)  # there mlx-lm's layer has the wrong shape
def test_dora_equals_mlx_lms(kind: str) -> None:
    """Output and all gradients, the magnitude's too, to 1e-5 in float32."""
    ours = moved(member("dora", kind))
    theirs = TheirDoRALinear.from_base(base(kind), r=4, scale=2.0)
    theirs.linear.freeze()
    theirs.lora_a, theirs.lora_b, theirs.m = ours.lora_a, ours.lora_b, ours.m
    x = normal(2, 5, INPUTS, seed=1)
    expected = gradients(theirs, theirs, x)
    for name, actual in gradients(ours, ours, x).items():
        assert distance(actual, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("start", ["default", "pissa"])
def test_doras_norm_is_that_of_the_adapted_weight(kind: str, start: str) -> None:
    """By products of the adapter's own size: the norms of the rows of W + s (a b)ᵀ, written out."""
    layer = moved(member("dora", kind, init_lora_weights=start))
    a, b = factors(layer)
    whole = dense_weight(layer.linear) + layer.scale * (a @ b).T
    assert distance(layer.norm(), mx.linalg.norm(whole, axis=1)) <= 1e-6


def test_dora_trains_a_magnitude_for_each_output() -> None:
    """`m` is float32, starts at the rows' norms, has a gradient, and doubles the output where it is doubled."""
    layer, x = member("dora", "bias"), normal(3, INPUTS, seed=1)
    assert mx.array_equal(layer.m, mx.sqrt(mx.square(layer.linear.weight).sum(axis=1))).item()
    assert mx.abs(gradients(layer, layer, x)["m"]).min().item() > 0
    before = layer(x) - layer.linear.bias
    layer.m = layer.m * 2
    assert distance(layer(x) - layer.linear.bias, 2 * before) <= 1e-6
    assert set(trainable(layer)) == {"lora_a", "lora_b", "m"}


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", MEMBERS)
def test_16_bit_activations_stay_16_bit(name: str, dtype: mx.Dtype) -> None:
    """What trains and its gradients are float32, the output is not."""
    layer = base("bias")
    layer.set_dtype(dtype)
    layer = adapted(evolve(LORA, **MEMBERS[name]), layer)
    x = normal(3, INPUTS, seed=1).astype(dtype)
    found = gradients(layer, layer, x)
    assert {found.pop("y").dtype, project(x, layer)[0].dtype} == {dtype}
    found.pop("loss")
    assert {value.dtype for value in (*found.values(), *trainable(layer).values())} == {mx.float32}


@pytest.mark.parametrize("out", [OUTPUTS, 400])
def test_pissa_starts_at_the_largest_singular_values(out: int) -> None:
    """`scale · (a b)ᵀ` is the best approximation of that rank, to 1e-4, by subspace iteration too; a and b share it."""
    spectrum = mx.array(0.8 ** np.arange(out), mx.float32)
    left, right = (mx.linalg.qr(normal(size, out, seed=out), stream=mx.cpu)[0] for size in (out, out + 16))
    weight = (left * spectrum) @ right.T
    best = (left[:, :4] * spectrum[:4]) @ right[:, :4].T
    a, b = pissa(weight, 4, 2.5, mx.random.key(0))
    assert distance(2.5 * (a @ b).T, best) <= 1e-4
    assert distance((a * a).sum(axis=0), (b * b).sum(axis=1)) <= 1e-4
    assert distance(largest_part(weight, 4, mx.random.key(0))[1], spectrum[:4]) <= 1e-4


def test_olora_starts_at_the_first_columns_of_qr() -> None:
    """`(a b)ᵀ` is Q's first columns times R's first rows, of the whole weight's decomposition."""
    weight = normal(OUTPUTS, INPUTS)
    q, r = mx.linalg.qr(weight, stream=mx.cpu)
    a, b = olora(weight, 4)
    assert distance(b, q[:, :4].T) <= 1e-5
    assert distance(a, r[:4].T) <= 1e-5


def test_the_first_gradients_differ_by_where_an_adapter_starts() -> None:
    """A default one's `lora_a` has none, as `lora_b` is 0; those that start at the weight move at once."""
    x = normal(7, INPUTS, seed=1)
    first = {name: gradients(layer, layer, x)["lora_a"] for name in MEMBERS for layer in [member(name)]}
    assert mx.abs(first["lora"]).max().item() == mx.abs(first["dora"]).max().item() == 0
    assert mx.abs(first["pissa"]).max().item() > 0.1 < mx.abs(first["olora"]).max().item()
    assert distance(first["pissa"], first["olora"]) > 0.1


def test_what_an_adapter_started_at_stays_where_it_is() -> None:
    """An update in place, as the compiled step makes, does not reach the frozen copy, and nothing else trains."""
    layer = member("pissa")
    start, _ = factors(layer)
    layer.lora_a[:] = layer.lora_a + 1
    assert mx.array_equal(factors(layer)[0][:, 4:], start[:, 4:]).item()
    assert mx.array_equal(factors(layer)[0][:, :4], start[:, :4] + 1).item()
    assert set(trainable(layer)) == {"lora_a", "lora_b"}


@pytest.mark.parametrize(
    ("kind", "dropout", "compiled"),
    [("bias", 0.0, False), ("dequantized", 0.0, False), ("dequantized", 0.3, False), ("bias", 0.3, True)],
)
def test_computed_together_it_is_the_same(kind: str, dropout: float, compiled: bool) -> None:
    """All members of the family on one x, by `project` and each by itself with the mask that `project` drew."""
    if compiled:
        mx.enable_compile()
    model = nn.Module()
    model.layers = [moved(member(name, kind, dropout=dropout)).train() for name in MEMBERS]
    x = normal(40, INPUTS, seed=1)
    keys = dropout_keys(*model.layers)
    weights = [normal(40, OUTPUTS, seed=20 + i) for i in range(len(MEMBERS))]

    def alone(x: mx.array) -> list[mx.array]:
        return [plain(layer, x, key) for layer, key in zip(model.layers, keys, strict=True)]

    results = []
    for way in (alone, lambda x: project(x, *model.layers, keys=keys)):
        step = nn.value_and_grad(
            model, lambda x, way=way: sum((y * w).sum() for y, w in zip(way(x), weights, strict=True))
        )
        outputs, (_, found) = way(x), (mx.compile(step) if compiled else step)(x)
        results.append([*outputs, *(value for _, value in sorted(tree_flatten(found)))])
    assert len(results[0]) == len(results[1]) == 3 * len(MEMBERS) + 2
    for expected, actual in zip(*results, strict=True):
        assert distance(actual, expected) <= 1e-5


def plain(layer: Any, x: mx.array, key: mx.array | None) -> mx.array:
    """The formula of the layer's class, with the mask of `key`."""
    from mlx_trainer.models.products import kept

    dropped = x
    if key is not None:
        mask, share = kept(x.shape, 1 - layer.dropout._p_1, key)
        dropped = mx.where(mask, x, 0) / share
    a, b = factors(layer)
    weight = dense_weight(layer.linear)
    bias = layer.linear.bias if "bias" in layer.linear else 0
    y = x @ weight.T + layer.scale * (dropped @ a) @ b
    if isinstance(layer, DoRALinear):
        y = y * layer.m / mx.stop_gradient(mx.linalg.norm(weight + layer.scale * (a @ b).T, axis=1))
    return y + bias


def experts(kind: str = "dense", bits: int | None = None) -> Any:
    """A frozen layer of four experts."""
    layer = SwitchLinear(INPUTS, OUTPUTS, 4, bias=kind == "bias")
    layer.weight = normal(4, OUTPUTS, INPUTS) * INPUTS**-0.5
    return (layer if bits is None else layer.to_quantized(32, bits)).freeze()


def embedding(bits: int | None = None) -> Any:
    """A frozen embedding of 96 tokens."""
    layer = nn.Embedding(96, INPUTS)
    layer.weight = normal(96, INPUTS)
    return (layer if bits is None else layer.to_quantized(32, bits)).freeze()


@pytest.mark.parametrize("bits", [None, 3, 4])
def test_experts_and_embeddings_have_mlx_lms_layers(bits: int | None) -> None:
    """Of its classes, shapes and function, starting at the base's output from the seed alone."""
    where = mx.array([[0, 3], [2, 1]])
    cases = [
        (
            LoRASwitchLinear,
            experts("bias", bits),
            (normal(2, 1, 1, INPUTS, seed=1), where),
            (4, 4, INPUTS),
            (4, OUTPUTS, 4),
        ),
        (LoRAEmbedding, embedding(bits), (mx.array([5, 90, 5]),), (96, 4), (4, INPUTS)),
    ]
    for kind, layer, inputs, a_shape, b_shape in cases:
        expected, state = layer(*inputs), random_state()
        ours, other = adapted(LORA, layer), adapted(LORA, layer)
        assert random_state() == state
        assert (type(ours), ours.lora_a.shape, ours.lora_b.shape, ours.scale) == (kind, a_shape, b_shape, 2.0)
        assert mx.array_equal(ours.lora_a, other.lora_a).item()
        assert distance(ours(*inputs), expected) <= 1e-6
        assert set(trainable(ours)) == {"lora_a", "lora_b"}
        assert distance(moved(ours)(*inputs), expected) > 0.01


@pytest.mark.parametrize("option", ["use_dora", "init_lora_weights"])
@pytest.mark.parametrize("layer", [experts(), embedding()])
def test_what_is_for_linear_layers_alone_is_refused_elsewhere(layer: nn.Module, option: str) -> None:
    """By the option's name and the layer's path."""
    lora = evolve(LORA, **{option: True if option == "use_dora" else "pissa"})
    with pytest.raises(
        ModelError, match=rf"lora\.{option} is for linear layers, and layers\.0\.linear is an embedding"
    ):
        adapted(lora, layer)


def test_a_subclass_of_the_layer_is_asked_itself() -> None:
    """`project` knows the exact classes; one of one's own computes what it says, magnitudes included."""

    class Doubling(DoRALinear):
        def __call__(self, x: mx.array) -> mx.array:
            return 2 * super().__call__(x)

    layer = Doubling(base(), rank=4, scale=2.0, dropout=0.0, key=mx.random.key(0))
    x = normal(3, INPUTS, seed=1)
    (y,) = project(x, layer)
    assert mx.array_equal(y, layer(x)).item()
    assert isinstance(layer, LoRALinear)
    assert list(adapted_layers(Model(layer))) == ["layers.0.linear"]
