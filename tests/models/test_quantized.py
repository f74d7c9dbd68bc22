"""Packed layers in training: the same numbers as a dense base, no dense weight kept, everything else as it was."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlx_trainer import Trainer, runtime
from mlx_trainer.callbacks import ModelCheckpoint
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import quantized
from mlx_trainer.models.adapters import save_adapters
from mlx_trainer.models.causal_lm import CausalLMModule
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import dimensions, inject_lora, trainable
from mlx_trainer.models.quantized import dequantize_at_use, dequantized_matmul
from mlx_trainer.traced import from_tree, to_tree
from tests.models.answers import continued
from tests.tiny import tiny_mistral

PACKINGS = [
    *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = LoRAConfig(rank=4, dropout=0.0, target_modules=TARGETS)
ROWS = 3 * 17
IDS = mx.array(np.random.default_rng(4).integers(10, 380, (3, 17)))

Layer = Callable[[mx.array], mx.array]


@pytest.fixture
def dequantized_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every product that dequantized its weight."""
    rows: list[int] = []

    def spy(x: mx.array, layer: Any) -> mx.array:
        rows.append(x.size // x.shape[-1])
        return dequantized_matmul(x, layer)

    monkeypatch.setattr(quantized, "dequantized_matmul", spy)
    return rows


def normal(*shape: int, seed: int = 0) -> mx.array:
    """Distinct float32 values."""
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def packed_linear(mode: str, bits: int, group: int, *, bias: bool = True, size: int = 256) -> nn.QuantizedLinear:
    """MLX's layer from random weights."""
    linear = nn.Linear(size, 96, bias=bias)
    linear.weight = normal(96, size, seed=7) * size**-0.5
    return nn.QuantizedLinear.from_linear(linear, group, bits, mode=mode)


def ours(layer: nn.QuantizedLinear | nn.QuantizedEmbedding) -> Any:
    """A copy of `layer` that dequantizes at use."""
    return dequantize_at_use(copy.copy(layer))


def dense_weight(layer: Any, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The weight as MLX dequantizes it."""
    packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **packing, dtype=dtype)


def value_and_gradient(layer: Layer, x: mx.array) -> list[mx.array]:
    """The output, and what flows back to x from distinct values."""
    y = layer(x)
    outputs, gradients = mx.vjp(layer, [x], [normal(*y.shape, seed=1).astype(y.dtype)])
    return [outputs[0], gradients[0]]


def distance(actual: mx.array, expected: mx.array) -> float:
    """The largest difference, in units of the largest expected value."""
    actual, expected = actual.astype(mx.float32), expected.astype(mx.float32)
    return (mx.abs(actual - expected).max() / mx.abs(expected).max()).item()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mode", "bits", "group"), PACKINGS)
def test_equals_the_dense_product_and_mlxs(mode: str, bits: int, group: int, bias: bool) -> None:
    """Value and gradient are a dense layer's bit for bit, and `quantized_matmul`'s to float32 rounding."""
    packed = packed_linear(mode, bits, group, bias=bias)
    dense = nn.Linear(256, 96, bias=bias)
    dense.weight = dense_weight(packed)
    if bias:
        dense.bias = packed.bias = normal(96, seed=5)
    x = normal(3, 17, 256)
    expected, mlxs, actual = (value_and_gradient(layer, x) for layer in (dense, packed, ours(packed)))
    for got, ideal, theirs in zip(actual, expected, mlxs, strict=True):
        assert got.dtype == theirs.dtype == mx.float32
        assert distance(got, ideal) <= 2e-7  # a dense layer adds its bias inside the product
        assert distance(got, theirs) <= 1e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("mode", "bits", "group"), PACKINGS)
def test_16_bit_activations_stay_16_bit(mode: str, bits: int, group: int, dtype: mx.Dtype) -> None:
    """In the activations' type the result is nearer to float32's than `quantized_matmul`, which sums in 16 bits."""
    packed = packed_linear(mode, bits, group, bias=False)
    packed.set_dtype(dtype)
    x, weight = normal(3, 17, 256).astype(dtype), dense_weight(packed)
    exact = value_and_gradient(lambda x: x @ weight.T, x.astype(mx.float32))
    for got, theirs, ideal in zip(
        value_and_gradient(ours(packed), x), value_and_gradient(packed, x), exact, strict=True
    ):
        assert got.dtype == theirs.dtype == dtype
        assert distance(got, ideal) <= min(distance(theirs, ideal), 2 * mx.finfo(dtype).eps)


@pytest.mark.parametrize("x_dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize("scale_dtype", [mx.float16, mx.float32])
def test_scales_of_another_type_give_the_type_that_mlx_gives(x_dtype: mx.Dtype, scale_dtype: mx.Dtype) -> None:
    """The result has `quantized_matmul`'s type and its values to the rounding of the narrower one."""
    packed = packed_linear("affine", 4, 64)
    packed.set_dtype(scale_dtype)
    x = normal(ROWS, 256).astype(x_dtype)
    got, theirs = value_and_gradient(ours(packed), x), value_and_gradient(packed, x)
    assert [value.dtype for value in got] == [value.dtype for value in theirs]
    assert max(map(distance, got, theirs)) <= 0.05


@pytest.mark.parametrize(("mode", "bits", "group"), [("affine", 4, 32), ("mxfp4", 4, 32)])
def test_a_packed_embedding_as_head(mode: str, bits: int, group: int) -> None:
    """As a head it is the dense product; as an embedding it is MLX's."""
    packed = nn.QuantizedEmbedding.from_embedding(nn.Embedding(128, 96), group, bits, mode=mode)
    head, weight, x = ours(packed), dense_weight(packed), normal(ROWS, 96)
    for got, ideal in zip(
        value_and_gradient(head.as_linear, x), value_and_gradient(lambda x: x @ weight.T, x), strict=True
    ):
        assert distance(got, ideal) <= 2e-7
    ids = mx.array([[3, 5], [127, 0]])
    assert mx.array_equal(head(ids), packed(ids)).item()


def growth_of_peak(compiled: bool, layer_of: Callable[[nn.QuantizedLinear], Layer]) -> float:
    """Bytes by which the peak of forward and backward grows with each of 40 more layers."""
    peaks, x = [], normal(ROWS, 512)
    for count in (40, 80):
        packed = [nn.QuantizedLinear(512, 512, bias=False, group_size=64, bits=4) for _ in range(count)]
        mx.eval([layer.parameters() for layer in packed])
        layers = list(map(layer_of, packed))

        def loss(x: mx.array, layers: list[Layer] = layers) -> mx.array:
            for layer in layers:
                x = layer(x)
            return x.sum()

        step = mx.value_and_grad(loss)
        if compiled:
            step = mx.compile(step)
        mx.eval(step(x))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(step(x))
        peaks.append(mx.get_peak_memory() - before)
    return (peaks[1] - peaks[0]) / 40


@pytest.mark.parametrize("compiled", [False, True])
def test_no_dense_weight_is_kept_for_the_backward_pass(compiled: bool) -> None:
    """Memory grows by less than the activations a layer; a plain dequantized product keeps its megabyte."""
    mx.enable_compile()

    def plain(packed: nn.QuantizedLinear) -> Layer:
        return lambda x: x @ dense_weight(packed).T

    assert growth_of_peak(compiled, ours) <= 4 * ROWS * 512
    assert growth_of_peak(compiled, plain) >= 0.9 * 4 * 512 * 512


@pytest.mark.parametrize(("threshold", "expected"), [(ROWS, [ROWS]), (ROWS + 1, [])])
def test_the_number_of_rows_decides(
    threshold: int, expected: list[int], monkeypatch: pytest.MonkeyPatch, dequantized_rows: list[int]
) -> None:
    """All leading dimensions are rows; one too few, and the result is `quantized_matmul`'s bit for bit."""
    monkeypatch.setitem(runtime.DEQUANTIZE_FROM_ROWS, runtime.backend(), threshold)
    packed, x = packed_linear("affine", 4, 64), normal(3, 17, 256)
    y = ours(packed)(x)
    assert dequantized_rows == expected
    assert mx.array_equal(y, packed(x)).item() == (not expected)


def test_the_thresholds_keep_one_row_packed_and_metal_as_it_is() -> None:
    """A generated token is one row; where nothing was measured, MLX decides."""
    assert min(runtime.DEQUANTIZE_FROM_ROWS.values()) > 1
    assert runtime.DEQUANTIZE_FROM_ROWS["metal"] == float("inf")


def quickest_ms(layer: Layer, rows: int) -> float:
    """The shortest of nine turns of forward and backward."""
    x, cotangent, times = normal(rows, 512), normal(rows, 512, seed=1), []
    for _ in range(9):
        start = time.perf_counter()
        mx.eval(mx.vjp(layer, [x], [cotangent]))
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


@pytest.mark.skipif(runtime.backend() != "cpu", reason="the threshold of the CPU")
@pytest.mark.parametrize("bits", [4, 8])
def test_the_threshold_of_the_cpu_is_right(bits: int) -> None:
    """From it on dequantizing is quicker, several times at 4 and 8 bits; for one row MLX's own way is."""
    packed = nn.QuantizedLinear(512, 512, bias=False, group_size=64, bits=bits)

    def dequantizing(x: mx.array) -> mx.array:
        return dequantized_matmul(x, packed)

    threshold = int(runtime.DEQUANTIZE_FROM_ROWS["cpu"])
    assert quickest_ms(dequantizing, threshold) < quickest_ms(packed, threshold)
    assert quickest_ms(packed, 1) < quickest_ms(dequantizing, 1)


def test_only_the_class_changes(tmp_path: Path) -> None:
    """Arrays, names, what is frozen, mode and MLX's own classes stay; a subclass with a product of its own is left."""

    class Own(nn.QuantizedLinear):
        """It computes something else."""

    model = load_model(tiny_mistral(tmp_path, bits=4), dtype="float32").train()
    model.model.layers[1].mlp.up_proj.__class__ = Own
    before = dict(tree_flatten(model.parameters()))
    layers = dict(model.named_modules())
    frozen = trainable(model).keys()
    assert dequantize_at_use(model) is model
    assert dict(model.named_modules()) == layers
    assert {name: id(value) for name, value in tree_flatten(model.parameters())} == {
        name: id(value) for name, value in before.items()
    }
    assert trainable(model).keys() == frozen
    assert all(module.training for module in model.modules())
    packed = [module for module in model.modules() if hasattr(module, "bits")]
    assert all(isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for module in packed)
    assert {type(module) for module in packed} == {quantized.QuantizedLinear, quantized.QuantizedEmbedding, Own}
    assert dimensions(model.model.layers[0].mlp.up_proj) == (64, 128)


def dense_base(model: nn.Module) -> nn.Module:
    """`model` with every packed layer replaced by the dense one that it stands for."""

    def dense(path: str, module: nn.Module) -> nn.Module:
        if not hasattr(module, "bits"):
            return module
        weight = dense_weight(module)
        new = nn.Embedding(1, 1) if isinstance(module, nn.QuantizedEmbedding) else nn.Linear(1, 1, bias=False)
        new.weight = weight
        return new

    model.update_modules(tree_map_with_path(dense, model.leaf_modules(), is_leaf=nn.Module.is_module))
    return model


class Dense(CausalLMModule):
    """A module on the base that a packed one stands for."""

    def load_model(self) -> nn.Module:
        return dense_base(super().load_model())


def module_of(kind: type[CausalLMModule], folder: Path) -> CausalLMModule:
    """A tiny module whose adapters are not zero."""
    module = kind(folder, dtype="float32", lora=LORA, max_seq_length=64)
    module.setup("fit")
    values = [
        (name, normal(*value.shape, seed=number) * 0.1)
        for number, (name, value) in enumerate(sorted(trainable(module.model).items()))
    ]
    module.model.update(tree_unflatten(values))
    return module


def rows_of(*lengths: int, seed: int = 0) -> list[TokenRow]:
    """Rows of random ids, trained but for their beginning."""
    random = np.random.default_rng(seed)
    return [
        TokenRow(f"x:{i}", random.integers(10, 380, n).astype(np.int32), np.arange(n) > 3)
        for i, n in enumerate(lengths)
    ]


def loss_and_gradients(module: CausalLMModule, batch: Any) -> tuple[float, dict[str, mx.array]]:
    """The loss's sum, and gradients by name."""
    traced = from_tree(to_tree(batch))
    loss = nn.value_and_grad(module.model, lambda _: module.training_loss(traced).total)
    value, gradients = loss(module.model)
    return value.item(), dict(tree_flatten(gradients))


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_step_on_a_packed_base_is_that_on_the_dense_one(
    tmp_path: Path, bits: int, tied: bool, layout: str, dequantized_rows: list[int]
) -> None:
    """Loss and adapter gradients to 1e-5, with every packed product of the step dequantized, the head's too."""
    tiny_mistral(tmp_path, bits=bits, tied=tied)
    packed, dense = module_of(CausalLMModule, tmp_path), module_of(Dense, tmp_path)
    rows = rows_of(19, 30, 11)
    padded, unpadded = collate(rows, Shape(3, 30, 90)), collate_unpadded(rows, Shape(3, 30, 64), 49)
    batch, products = (padded, [90] * 15) if layout == "padded" else (unpadded, [64] * 11 + [49] * 4)
    value, gradients = loss_and_gradients(packed, batch)
    assert dequantized_rows == products
    expected, expected_gradients = loss_and_gradients(dense, batch)
    assert len(dequantized_rows) == 15
    assert value == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == expected_gradients.keys() != set()
    for name, gradient in expected_gradients.items():
        assert distance(gradients[name], gradient) <= 1e-5, name


def test_generated_tokens_stay_packed(tmp_path: Path, dequantized_rows: list[int]) -> None:
    """A long prompt is read dequantized; the tokens after it, one row each, are not."""
    module = module_of(CausalLMModule, tiny_mistral(tmp_path, bits=4))
    module.model.eval()
    assert len(continued(module.model, IDS.reshape(-1).tolist(), 6)) == 6
    assert set(dequantized_rows) == {ROWS - 1}  # mlx-lm reads a prompt's last token like a generated one
    assert continued(module.model, IDS[0].tolist(), 6)
    assert set(dequantized_rows) == {ROWS - 1}


def test_mlx_lm_opens_adapters_trained_dequantized(tmp_path: Path) -> None:
    """Saved from a packed base they are mlx-lm's, whose `load_adapters` also takes a base that dequantizes."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load

    base = tiny_mistral(tmp_path / "base", bits=4)
    model = module_of(CausalLMModule, base).model.eval()
    save_adapters(model, tmp_path / "adapter", base=str(base))
    theirs, _ = load(str(base), adapter_path=str(tmp_path / "adapter"))
    onto_ours = load_adapters(dequantize_at_use(load_model(base, dtype="float32")), str(tmp_path / "adapter")).eval()
    assert distance(theirs(IDS), model(IDS)) <= 1e-5
    assert distance(onto_ours(IDS), model(IDS)) <= 1e-6
    plain = inject_lora(load_model(base, dtype="float32"), LORA)
    assert distance(plain(IDS), model(IDS)) > 1e-2


def test_a_run_on_a_packed_base_cut_in_two_ends_as_the_whole_one(tmp_path: Path, dequantized_rows: list[int]) -> None:
    """With dropout and AdamW, the adapters are bit for bit those of the unbroken run."""
    tiny_mistral(tmp_path / "base", bits=4)
    batches = [collate(rows_of(12, 20, seed=seed), Shape(2, 20, 40)) for seed in range(4)]

    def run(directory: Path, steps: int) -> dict[str, list[Any]]:
        lora = LoRAConfig(rank=4, dropout=0.2, target_modules=TARGETS)
        module = CausalLMModule(tmp_path / "base", dtype="float32", lora=lora, max_seq_length=64, schedule="constant")
        module.setup("fit")
        saving = ModelCheckpoint(directory, every=2)
        Trainer(max_steps=steps, max_epochs=2, callbacks=[saving], resume="auto").fit(module, batches)
        return {name: value.tolist() for name, value in trainable(module.model).items()}

    whole = run(tmp_path / "whole", 6)
    assert run(tmp_path / "cut", 4) != whole
    assert run(tmp_path / "cut", 6) == whole
    assert set(dequantized_rows) == {40}
