"""The loss and all gradients with the package's CUDA kernels, on a CPU, beside those without."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.cuda import kernels
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.models.recomputation import POLICIES, Policy
from tests.cuda import emulator
from tests.models.test_shared_prefixes import shape_of, sharing_rows
from tests.models.test_unpadded import LINEARS, loss_and_gradients, module_of
from tests.tiny import tiny_mistral


@pytest.mark.parametrize("prefix", [0, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_gradients_are_the_same(
    tmp_path: Path, policy: Policy, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs again, with a shared prefix and without; each kernel of the model is launched."""
    tiny_mistral(tmp_path)
    lora = LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS)
    module = module_of(tmp_path, lora=lora, recompute=policy)
    monkeypatch.setattr("mlx_trainer.runtime.linux_cpu", lambda: False)
    own = [3, 1, 4, 2, 6]
    shape = shape_of(own, prefix, 3, 2, 1) if prefix else Shape(len(own), max(own) + 1, sum(own) + 2)
    batch = collate_unpadded(sharing_rows(own, prefix, 3, 0), shape, 30)
    expected = loss_and_gradients(module, batch)
    emulator.use(monkeypatch)
    launched = set()
    monkeypatch.setattr(kernels, "run", lambda name, *rest: launched.add(name) or emulator.run(name, *rest))
    found = loss_and_gradients(module, batch)
    assert launched == {"take_rows", "take_heads", "swiglu", "swiglu_gradient", "join_columns", "split_columns"}
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    largest = max(mx.abs(value).max().item() for value in expected[2].values())
    for name, value in expected[2].items():
        assert mx.abs(found[2][name] - value).max().item() <= 1e-5 * mx.abs(value).max().item() + 1e-6 * largest, name
