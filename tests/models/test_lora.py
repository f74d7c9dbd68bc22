"""The LoRA layer against mlx-lm's, and its injection: where it goes, what trains, and what is refused."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.lora import LoRALinear, inject_lora, trainable, unfreeze
from mlx_trainer.state import random_state


class Block(nn.Module):
    """A stand-in for a transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(32, 64, bias=False)
        self.v_proj = nn.Linear(64, 32)
        self.norm = nn.RMSNorm(32)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.v_proj(self.q_proj(x)))


class Blocks(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = [Block() for _ in range(count)]
        self.head = nn.Linear(32, 8, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def rows(*shape: int, seed: int = 0) -> mx.array:
    """Distinct float32 values."""
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def pair(linear: nn.Linear | nn.QuantizedLinear, dropout: float) -> tuple[nn.Module, nn.Module]:
    """Our layer and mlx-lm's with the same adapters, both in training mode."""
    from mlx_lm.tuner.lora import LoRALinear as Theirs

    ours = LoRALinear(linear, rank=4, scale=2.5, dropout=dropout, key=mx.random.key(3))
    ours.lora_b = rows(4, 48, seed=1)
    theirs = Theirs.from_base(linear, r=4, dropout=dropout, scale=2.5)
    theirs.lora_a, theirs.lora_b = ours.lora_a, ours.lora_b
    return ours, theirs


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_layer_equals_mlx_lms_bit_for_bit(bits: int | None, dropout: float) -> None:
    """In float32, values and adapter gradients are mlx-lm's own, over packed bases and with dropout drawn alike."""
    linear = nn.Linear(64, 48)
    base = linear if bits is None else nn.QuantizedLinear.from_linear(linear, 32, bits)
    x, results = rows(2, 5, 64), []
    for layer in pair(base, dropout):
        mx.random.seed(7)
        layer.linear.freeze()
        results.append(nn.value_and_grad(layer, lambda layer: mx.square(layer(x)).sum())(layer))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert ours.item() == theirs.item()
    for name in ("lora_a", "lora_b"):
        assert mx.array_equal(our_gradients[name], their_gradients[name]).item(), name


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_16_bit_activations_stay_16_bit(dtype: mx.Dtype) -> None:
    """No array of the layer's computation is float32 but the adapters; their gradients are float32 again."""
    linear = nn.Linear(64, 48)
    linear.set_dtype(dtype)
    layer = LoRALinear(linear, rank=4, scale=2.0, dropout=0.1, key=mx.random.key(0))
    layer.linear.freeze()
    x = rows(3, 64).astype(dtype)
    gradients = nn.value_and_grad(layer, lambda layer: layer(x).sum())(layer)[1]
    assert layer(x).dtype == (layer.dropout(x) @ layer.lora_a.astype(dtype)).dtype == dtype
    assert (gradients["lora_a"].dtype, gradients["lora_b"].dtype) == (mx.float32, mx.float32)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj",), ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
        (("layers.1.v_proj", "head"), ["head", "layers.1.v_proj"]),
        (("2.q_proj", "q_proj"), ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
    ],
)
def test_targets_are_last_components_or_dotted_paths(targets: tuple[str, ...], expected: list[str]) -> None:
    """Exactly the adapters of the layers whose path ends in a target train; everything else is frozen."""
    model = inject_lora(Blocks(), LoRAConfig(rank=2, target_modules=targets))
    assert sorted(trainable(model)) == sorted(f"{path}.{name}" for path in expected for name in ("lora_a", "lora_b"))


def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_alone() -> None:
    """lora_b starts at 0, lora_a within 1/sqrt(in); the global random state neither matters nor moves."""
    starts, x = [], rows(4, 32)
    for global_seed, seed in ((0, 5), (1, 5), (1, 6)):
        mx.random.seed(global_seed)
        model = Blocks()
        before, state = model(x), random_state()
        inject_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"], dropout=0.0), seed=seed)
        assert mx.array_equal(model(x), before).item()
        assert random_state() == state
        starts.append({name: value.tolist() for name, value in trainable(model).items()})
    assert starts[0] == starts[1] != starts[2]
    assert starts[0]["layers.0.q_proj.lora_a"] != starts[0]["layers.1.q_proj.lora_a"]
    assert 0.9 / 32**0.5 < np.abs(starts[0]["layers.0.q_proj.lora_a"]).max() <= 1 / 32**0.5


def test_injection_keeps_the_mode() -> None:
    """A model in eval mode stays there, new dropout included."""
    model = inject_lora(Blocks().eval(), LoRAConfig(target_modules=["q_proj"], dropout=0.5))
    assert not any(module.training for _, module in model.named_modules())


def test_a_target_without_a_layer_is_named_with_the_nearest() -> None:
    """A misspelt target is an error that lists the model's layers, and nothing was changed by then."""
    model = Blocks()
    with pytest.raises(ModelError, match=r"no layer is called q_prj\. Did you mean q_proj\? .* head, q_proj, v_proj"):
        inject_lora(model, LoRAConfig(target_modules=["v_proj", "q_prj"]))
    with pytest.raises(ModelError, match=r"no layer is called norm\. The layers"):
        inject_lora(model, LoRAConfig(target_modules=["norm"]))
    assert len(trainable(model)) == len(tree_flatten(model.parameters()))


def test_full_mode_frees_everything_but_refuses_packed_weights() -> None:
    """Every parameter of a plain model trains; a quantized one is refused by the name of a packed layer."""
    model = Blocks()
    model.freeze()
    assert len(trainable(unfreeze(model))) == len(tree_flatten(model.parameters()))
    nn.quantize(model, 32, 4)
    with pytest.raises(ModelError, match=r"cannot train packed weights such as \S*(proj|head)"):
        unfreeze(model)
