"""The estimate of a step's memory holds for DPO too, whose reference runs in the same step."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.models.memory import estimate
from mlx_trainer.models.recomputation import POLICIES, Policy
from mlx_trainer.preference import DPOModule
from tests.models.test_memory import ALL, QV, measured
from tests.preference.pairs import pairs_of, shape_of
from tests.tiny import tiny_mistral

Size = tuple[int, int, LoRAConfig, int, tuple[int, int, int], int]
SIZES: list[Size] = [
    (64, 12, QV, 2, (32, 32, 32), 0),
    (128, 10, ALL, 2, (48, 48, 40), 0),
    (128, 8, QV, 4, (65, 30, 30), 64),
]
"""Hidden size, layers, adapters, pairs, tokens of prompt and both answers, and how many of the prompt's are shared."""


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "attention"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_estimate_is_within_a_tenth(tmp_path: Path, size: Size, policy: Policy, kept: bool) -> None:
    """Of the measured peak of the compiled step, with the base as reference and with adapters that were kept.

    Nothing of the reference is kept for the gradient. Where a shared prompt runs again in whole blocks the estimate is
    a little more above: the tolerance is an eighth there.
    """
    hidden, layers, lora, pairs, lengths, shared = size
    tiny_mistral(tmp_path, hidden_size=hidden, layers=layers)
    module = DPOModule(tmp_path, dtype="float32", lora=lora, recompute=policy, max_seq_length=256)
    module.setup("fit")
    mx.eval(module.model.parameters())
    rows = pairs_of([lengths] * pairs)
    batch = collate_unpadded(rows, shape_of(rows, shared), sum(int(row.trained.sum()) for row in rows))
    expected = estimate(module.model, batch, module.configure_optimizer(1_000), policy)
    if kept:
        module.keep_reference()
    mx.enable_compile()
    tolerance = 0.125 if shared and policy == "block" else 0.1
    assert expected.peak == pytest.approx(measured(module, batch), rel=tolerance)
