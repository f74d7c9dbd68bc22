"""The estimate of a step's memory is near the measured peak, and decides what runs again."""

import gc
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from attrs import evolve
from mlx.utils import tree_flatten

from mlx_trainer import Trainer, runtime
from mlx_trainer.callbacks import GradientClipping, NaNGuard
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.unpadded import UnpaddedBatch
from mlx_trainer.models import CausalLMModule, ModelError, memory
from mlx_trainer.models.memory import choose, estimate
from mlx_trainer.models.recomputation import POLICIES, Policy
from mlx_trainer.models.step_memory import WAIT_FROM
from tests.models.batches import labelled
from tests.models.test_recomputation import batch_of
from tests.models.test_unpadded import LINEARS, rows_of
from tests.tiny import tiny_mistral

QV = LoRAConfig(rank=8, dropout=0.0)
ALL = LoRAConfig(rank=4, dropout=0.1, target_modules=LINEARS)
SIZES: list[tuple[int, int, LoRAConfig | None, int, int]] = [
    (64, 12, QV, 4, 64),
    (128, 8, QV, 2, 128),
    (64, 16, ALL, 8, 32),
    (128, 10, ALL, 3, 96),
    (64, 12, None, 4, 64),
]
"""Hidden size, layers, adapters, rows, length."""


def batch_of_size(rows: int, length: int) -> UnpaddedBatch:
    """Equal rows, two thirds of each trained."""
    return batch_of(rows_of([length] * rows, [[i % 3 > 0 for i in range(length - 1)]] * rows, 0))


def measured(module: CausalLMModule, batch: UnpaddedBatch) -> int:
    """The peak of six compiled steps, in bytes, everything else that is held left out.

    Where others keep the cores busy, the host does not get ahead in each of them, and holds less.
    """
    gc.collect()  # what earlier tests left must not be given back meanwhile
    mx.synchronize()
    others = mx.get_active_memory() - memory.size(module.model.parameters())
    mx.reset_peak_memory()
    Trainer(max_steps=6, callbacks=[GradientClipping(), NaNGuard()]).fit(module, [batch] * 6)
    mx.synchronize()
    return mx.get_peak_memory() - others


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_estimate_is_within_a_tenth(tmp_path: Path, size: Any, policy: Policy) -> None:
    """Of the measured peak of the compiled step, weights and optimizer included."""
    hidden, layers, lora, rows, length = size
    tiny_mistral(tmp_path, hidden_size=hidden, layers=layers)
    module = CausalLMModule(tmp_path, dtype="float32", lora=lora, recompute=policy, max_seq_length=256)
    module.setup("fit")
    mx.eval(module.model.parameters())
    batch = batch_of_size(rows, length)
    expected = estimate(module.model, batch, module.configure_optimizer(1_000), policy)
    mx.enable_compile()
    assert expected.peak == pytest.approx(measured(module, batch), rel=0.1)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_magnitudes_and_starts_are_counted(tmp_path: Path, option: dict[str, Any]) -> None:
    """The outputs that magnitudes scale are kept, and starts that are taken off are of twice the rank."""
    test_the_estimate_is_within_a_tenth(tmp_path, (64, 12, evolve(ALL, **option), 4, 64), "none")


@pytest.fixture
def module(tmp_path: Path) -> CausalLMModule:
    """A tiny Mistral in training mode, which chooses for itself."""
    tiny_mistral(tmp_path, layers=12)
    module = CausalLMModule(tmp_path, dtype="float32", lora=ALL, max_seq_length=256)
    module.setup("fit")
    return module


def peaks(module: CausalLMModule, batch: UnpaddedBatch) -> dict[Policy, int]:
    """The estimate for each policy."""
    optimizer = module.configure_optimizer(10)
    return {policy: estimate(module.model, batch, optimizer, policy).peak for policy in POLICIES}


@pytest.mark.parametrize("fused", [False, True])
def test_as_little_runs_again_as_fits(module: CausalLMModule, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """With ever less memory the choice goes through all policies, without `attention` where that is fused."""
    monkeypatch.setattr(memory, "fused", lambda dtype: fused)
    batch, optimizer = batch_of_size(8, 32), module.configure_optimizer(10)
    needed = peaks(module, batch)
    order = [policy for policy in POLICIES if not fused or policy != "attention"]
    assert sorted(order, key=lambda policy: -needed[policy]) == order

    def chosen(limit: float) -> str:
        return choose(module.model, batch, optimizer, int(limit)).policy

    for policy, leaner in zip(order, [*order[1:], "block"], strict=True):
        fits = needed[policy] / (1 - memory.MARGIN)
        assert (chosen(fits + 2), chosen(fits - 2)) == (policy, leaner)


def test_the_choice_is_told_once_and_bounds_the_cache(
    module: CausalLMModule, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line at the first shape, one where a larger shape needs another policy, a warning where none fits."""
    small, large = batch_of_size(4, 32), batch_of_size(8, 32)
    needed = peaks(module, small)
    limit = round(needed["none"] / (1 - memory.MARGIN)) + 2
    bounds: list[int] = []
    waits: list[int] = []
    held = mx.get_active_memory()
    monkeypatch.setattr(mx, "get_active_memory", lambda: held)
    monkeypatch.setattr(runtime, "memory_limit_bytes", lambda: limit)
    monkeypatch.setattr(runtime, "bound_memory", lambda needed, most: (bounds.append(needed), waits.append(most)))
    caplog.set_level(logging.INFO, "mlx_trainer.models")
    caplog.clear()
    chosen = [module.recomputation(batch) for batch in (small, small, large, small)]
    assert (chosen[0], chosen[1], chosen[3]) == ("none",) * 3
    assert chosen[2] != "none"
    lines = [record.getMessage() for record in caplog.records]
    assert [line.rpartition(" ")[2] for line in lines] == ["none.", f"{chosen[2]}."]
    assert lines[0].startswith(f"Memory: about {needed['none'] / 1e9:.3g} GB of {limit / 1e9:.3g} GB (weights ")
    assert bounds == [needed["none"]] * 2 + [max(needed["none"], peaks(module, large)[chosen[2]])] * 2
    step = estimate(module.model, small, module.configure_optimizer(1_000), "none")
    assert waits[:2] == [held + step.kept + int(WAIT_FROM * step.in_flight)] * 2
    monkeypatch.setattr(runtime, "memory_limit_bytes", lambda: needed["block"] // 2)
    module._memory.needed = 0
    assert module.recomputation(small) == "block"
    assert "use smaller batches" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelname == "WARNING"


def test_a_larger_shape_is_told(module: CausalLMModule, caplog: pytest.LogCaptureFixture) -> None:
    """A shape that needs more memory by a tenth gets a line of its own, a smaller or equal one none."""
    caplog.set_level(logging.INFO, "mlx_trainer.models")
    caplog.clear()
    small, large = batch_of_size(2, 32), batch_of_size(16, 32)
    assert [module.recomputation(batch) for batch in (small, large, small, large)] == ["none"] * 4
    told = [record.getMessage().partition(" of ")[0] for record in caplog.records]
    assert told == [f"Memory: about {peaks(module, batch)['none'] / 1e9:.3g} GB" for batch in (small, large)]


def test_without_gradients_nothing_is_chosen(module: CausalLMModule, caplog: pytest.LogCaptureFixture) -> None:
    """Evaluation keeps nothing, so it says nothing."""
    caplog.set_level(logging.INFO, "mlx_trainer.models")
    module.model.eval()
    caplog.clear()
    assert (module.recomputation(batch_of_size(4, 32)), caplog.records) == ("none", [])


def test_unknown_policies_and_padded_batches_are_refused(tmp_path: Path) -> None:
    """By name, and before anything is computed; padded batches take what keeps everything."""
    with pytest.raises(ModelError, match="recompute 'all' is unknown; it is one of auto, none, attention"):
        CausalLMModule(tmp_path, recompute="all")  # type: ignore[arg-type]
    tiny_mistral(tmp_path)
    module = CausalLMModule(tmp_path, dtype="float32", recompute="mlp")
    module.setup("fit")
    with pytest.raises(ModelError, match='recompute="mlp" needs unpadded batches'):
        module.training_loss(labelled())
    module.recompute = "none"
    assert module.training_loss(labelled()).weight.item() == 12


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_the_optimizers_state_is_exact(module: CausalLMModule, name: str) -> None:
    """It is what the optimizer holds after it has updated once."""
    made: Any = {
        "adamw": optimizers.AdamW(1e-3),
        "lion": optimizers.Lion(1e-3),
        "sgd": optimizers.SGD(1e-3, momentum=0.9),
        "adafactor": optimizers.Adafactor(1e-3),
    }[name]
    expected = estimate(module.model, batch_of_size(4, 32), made, "none").state
    made.update(module.model, module.model.trainable_parameters())
    assert expected == sum(value.nbytes for _, value in tree_flatten(made.state))
