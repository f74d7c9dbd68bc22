"""What runs again in the backward pass changes no number, and makes a step need less memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_trainer import Trainer
from mlx_trainer.callbacks import GradientClipping, NaNGuard
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import UnpaddedBatch, collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import CausalLMModule, attention, unpadded
from mlx_trainer.models.recomputation import POLICIES, run_again
from mlx_trainer.traced import from_tree, to_tree
from tests.models.test_unpadded import LINEARS, ROWS, drawn_rows, rows_of
from tests.tiny import tiny_mistral

DROPPING = LoRAConfig(rank=4, dropout=0.3, target_modules=LINEARS)
OTHERS = [policy for policy in POLICIES if policy != "none"]


def module_of(folder: Path, lora: LoRAConfig | None = DROPPING, **options: Any) -> CausalLMModule:
    """A tiny module whose adapters are not zero and whose dropout is on."""
    module = CausalLMModule(folder, dtype="float32", lora=lora, **options)
    for name, values in tree_flatten(module.model.trainable_parameters()):
        if "lora" in name:
            values[:] = mx.random.normal(values.shape, key=mx.random.key(values.size)) * 0.1
    module.model.train()
    return module


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> CausalLMModule:
    """A tiny Mistral with adapters on every linear layer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_mistral(folder)
    return module_of(folder)


def batch_of(rows: list[TokenRow], spare: int = 0) -> UnpaddedBatch:
    """The unpadded batch of `rows`, with some cells and positions to spare."""
    length = max(map(len, rows)) + spare
    positions = min(sum(map(len, rows)) + 1 + spare, len(rows) * length)
    return collate_unpadded(rows, Shape(len(rows), length, positions), sum(row.trained_tokens for row in rows) + 1)


def loss_and_gradients(module: CausalLMModule, batch: UnpaddedBatch, policy: str) -> tuple[float, dict[str, mx.array]]:
    """The loss sum and the gradients by name; every call draws the same dropout."""
    module.recompute, traced = policy, from_tree(to_tree(batch))
    mx.random.seed(5)
    value, gradients = nn.value_and_grad(module.model, lambda _: module.training_loss(traced).total)(module.model)
    return value.item(), dict(tree_flatten(gradients))


def assert_same(module: CausalLMModule, batch: UnpaddedBatch) -> None:
    """Each policy has the loss of `none`, to the bit, and its gradients but for the order of sums."""
    loss, gradients = loss_and_gradients(module, batch, "none")
    largest = max(mx.abs(gradient).max().item() for gradient in gradients.values())
    for policy in OTHERS:
        other_loss, others = loss_and_gradients(module, batch, policy)
        assert (other_loss, others.keys()) == (loss, gradients.keys())
        for name, expected in gradients.items():
            allowed = 1e-5 * mx.abs(expected).max().item() + 1e-6 * largest
            assert mx.abs(others[name] - expected).max().item() <= allowed, (policy, name)


@given(drawn_rows(), st.integers(0, 4))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_the_numbers_are_those_of_none(module: CausalLMModule, rows: list[TokenRow], spare: int) -> None:
    """Loss and every gradient, for rows of any length, dropout on."""
    assert_same(module, batch_of(rows, spare))


@pytest.mark.parametrize("fused", [True, False])
def test_other_attention(module: CausalLMModule, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """The same where attention is MLX's, and where it does not run again because it is fused."""
    monkeypatch.setattr(attention, "KEPT_SCORES", 0)
    monkeypatch.setattr(unpadded, "fused", lambda dtype: fused)
    assert_same(module, batch_of(ROWS, 2))


@pytest.mark.parametrize("kind", ["4-bit", "all weights", "q and v", "a trained head", "dora", "pissa", "embeddings"])
def test_other_bases_and_targets(tmp_path: Path, kind: str) -> None:
    """A packed base, full fine-tuning (also of the norms), adapters on two layers, the head, embeddings, and others."""
    tiny_mistral(tmp_path, bits=4 if kind == "4-bit" else None)
    targets = {
        "q and v": ["q_proj", "v_proj"],
        "a trained head": ["lm_head", *LINEARS],
        "embeddings": ["embed_tokens", *LINEARS],
    }.get(kind, LINEARS)
    own: dict[str, Any] = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}.get(kind, {})
    lora = None if kind == "all weights" else LoRAConfig(rank=4, dropout=0.3, target_modules=targets, **own)
    assert_same(
        module_of(tmp_path, lora), batch_of(rows_of([40, 7, 1, 12], [[True] * 39, [True] * 6, [], [True] * 11], 2))
    )


def test_dropout_drops(module: CausalLMModule) -> None:
    """The draws that all policies share are none of a dropout that is off."""
    batch = batch_of(ROWS)
    first = loss_and_gradients(module, batch, "block")
    module.model.eval()
    without = loss_and_gradients(module, batch, "block")
    module.model.train()
    assert first[0] != without[0]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_ends_with_the_same_weights(tmp_path: Path, accumulate: int) -> None:
    """Under the compiled step, dropout on: three steps with each policy leave the adapters that `none` leaves."""
    tiny_mistral(tmp_path)
    random = np.random.default_rng(0)
    batches = [
        batch_of(rows_of(random.integers(5, 15, 3).tolist(), [[True] * 14] * 3, seed), spare=2) for seed in range(6)
    ]
    ends = {}
    mx.enable_compile()
    for policy in POLICIES:
        module = module_of(tmp_path, recompute=policy)
        Trainer(max_steps=3, accumulate=accumulate).fit(module, batches)
        ends[policy] = dict(tree_flatten(module.model.trainable_parameters()))
    for policy in OTHERS:
        for name, expected in ends["none"].items():
            assert mx.abs(ends[policy][name] - expected).max().item() < 1e-5, (policy, name)


def peak_bytes(module: CausalLMModule, batch: UnpaddedBatch, policy: str) -> int:
    """The most bytes that a forward and a backward pass hold, over what is held before."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, gradients = loss_and_gradients(module, batch, policy)
    mx.eval(gradients)
    mx.synchronize()
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("kept", [attention.KEPT_SCORES, 0], ids=["own attention", "MLX's"])
def test_each_policy_needs_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    """Many layers: each needs at least a tenth less than the one before it, `selective` no more than `attention`.

    What `selective` runs again is mostly what `attention` makes again in any case: norms and SwiGLU.
    """
    monkeypatch.setattr(attention, "KEPT_SCORES", kept)
    tiny_mistral(tmp_path, layers=32)
    module = module_of(tmp_path, max_seq_length=96)
    batch = batch_of(rows_of([96] * 3, [[True] * 95] * 3, 0))
    # Where others use the machine less may be queued at once, and a peak be less than it is by itself.
    peaks = {policy: max(peak_bytes(module, batch, policy) for _ in range(3)) for policy in POLICIES}
    assert peaks["attention"] < 0.9 * peaks["none"]
    assert peaks["selective"] < 1.02 * peaks["attention"]
    assert peaks["mlp"] < 0.9 * peaks["selective"]
    assert peaks["block"] < 0.9 * peaks["mlp"]


def test_what_runs_again_leaves_the_modules_as_they_were() -> None:
    """No array of an inner trace stays in a module, and what it trains has its gradient."""
    layer = nn.Linear(3, 2)
    weight = layer.weight
    x = mx.array([[1.0, 2.0, 3.0]])

    def loss(parameters: Any, x: mx.array) -> mx.array:
        layer.update(parameters)
        return run_again(layer, layer)(x).square().sum()

    gradients, to_x = mx.grad(loss, argnums=(0, 1))(layer.parameters(), x)
    y = x @ weight.T + layer.bias
    assert mx.allclose(gradients["weight"], 2 * y.T @ x)
    assert mx.allclose(to_x, 2 * y @ weight)
    assert mx.array_equal(layer.weight, weight)


def test_a_model_is_given_back_after_its_training(tmp_path: Path) -> None:
    """No update is left that waits to be computed, with all that it hangs on: several runs fit into one process."""
    tiny_mistral(tmp_path)
    module = module_of(tmp_path, recompute="mlp")
    mx.enable_compile()
    Trainer(max_steps=2, callbacks=[GradientClipping(), NaNGuard()]).fit(module, [batch_of(ROWS)] * 2)
    part = weakref.ref(module.model.model.layers[0].mlp)
    del module
    gc.collect()
    assert part() is None
