"""Rows that begin alike compute that prefix once: the loss and all gradients are those of the padded rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_trainer import DataPipeline, Trainer, runtime
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.data.report import report_on
from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import CausalLMModule
from mlx_trainer.models.recomputation import POLICIES, Policy
from mlx_trainer.traced import from_tree, to_tree
from tests.models.test_unpadded import LINEARS, compare, loss_and_gradients, module_of
from tests.tiny import tiny_mistral

TURN = ("user", "assistant")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> CausalLMModule:
    """A tiny Mistral with adapters on every linear layer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_mistral(folder)
    return module_of(folder, lora=LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS))


def sharing_rows(own: Sequence[int], prefix: int, each: int, seed: int) -> list[TokenRow]:
    """Rows of `own` random tokens behind a prefix that `each` rows share; some of what follows is trained."""
    random = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(own):
        if i % each == 0:
            shared = random.integers(10, 380, prefix)
        ids = np.concatenate([shared, random.integers(10, 380, length)]).astype(np.int32)
        trained = np.concatenate([np.zeros(prefix + 1, bool), random.random(length - 1) < 0.7])
        rows.append(TokenRow(f"x:{i}", ids, trained))
    return rows


def shape_of(own: Sequence[int], prefix: int, each: int, groups: int, spare: int) -> Shape:
    """The tightest shape, with `spare` tokens more in each row."""
    length = max(own) + spare
    tokens = groups * prefix + min(sum(own) + 1 + spare, groups * each * length)
    return Shape(groups * each, length, tokens, prefix, groups)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(1, 4),
    st.integers(0, 1),
    st.integers(0, 3),
    st.integers(0, 3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_equals_padded(
    module: CausalLMModule, own: list[int], prefix: int, each: int, spare_groups: int, spare: int, seed: int
) -> None:
    """Whatever the prefix, in one group or several, the last one short or missing, with room to spare or none."""
    rows = sharing_rows(own, prefix, each, seed)
    groups = -(-len(rows) // each) + spare_groups
    for quick in (False, True):
        with patch.object(runtime, "linux_cpu", lambda quick=quick: quick):
            compare(module, rows, shape_of(own, prefix, each, groups, spare), quick)


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_padded_when_run_again(tmp_path: Path, policy: Policy) -> None:
    """Whatever the backward pass runs again."""
    tiny_mistral(tmp_path)
    lora = LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS)
    again = module_of(tmp_path, lora=lora, recompute=policy)
    own = [3, 5, 4, 2, 6]
    with patch.object(runtime, "linux_cpu", lambda: False):
        rows, shape = sharing_rows(own, 16, 3, 0), shape_of(own, 16, 3, 2, 1)
        plain = module_of(tmp_path, lora=lora, recompute="none")
        expected = loss_and_gradients(plain, collate_unpadded(rows, shape, 30))
        found = loss_and_gradients(again, collate_unpadded(rows, shape, 30))
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    largest = max(mx.abs(value).max().item() for value in expected[2].values())
    for name, value in expected[2].items():
        assert mx.abs(found[2][name] - value).max().item() <= 1e-5 * mx.abs(value).max().item() + 1e-6 * largest, name


def test_a_longer_prefix_is_computed_once() -> None:
    """Positions are those of the prefix and of what follows, and the metadata says how many tokens were spared."""
    own = [3, 5, 4, 2, 6]
    batch = collate_unpadded(sharing_rows(own, 16, 3, 0), shape_of(own, 16, 3, 2, 0), 30)
    assert len(batch.input_ids) == 2 * 16 + sum(own) + 1
    assert (batch.metadata.tokens, batch.metadata.shared_tokens) == (5 * 16 + sum(own), 3 * 16)


@pytest.mark.parametrize("change", ["id", "trained"])
def test_rows_that_do_not_share_are_refused(change: str) -> None:
    """Another id in the prefix, or a token trained there or predicted from there, would train something else."""
    own = [3, 5, 4]
    rows = sharing_rows(own, 8, 3, 0)
    if change == "id":
        rows[1].ids[7] += 1
    else:
        rows[2].trained[8] = True
    with pytest.raises(DataError, match=r"x:\d does not share the 8 tokens"):
        collate_unpadded(rows, shape_of(own, 8, 3, 1, 0), 30)


def test_an_empty_batch_trains_nothing(module: CausalLMModule) -> None:
    """A rank without rows computes a loss of zero over nothing."""
    batch = collate_unpadded([], Shape(4, 8, 40, prefix=8, groups=2), 5)
    assert batch.metadata.shared_tokens == 0
    assert mx.isfinite(module.training_loss(from_tree(to_tree(batch))).total).item()


def test_a_run_shares_what_its_rows_share(tmp_path: Path) -> None:
    """A system prompt is computed once a batch, without anybody asking; the loss is that of padded batches."""
    tiny_mistral(tmp_path)
    system = {"role": "system", "content": "the cat and the dog see a house " * 4}
    lines = [
        json.dumps({"messages": [system, *({"role": r, "content": "dog " * (1 + i % 5) + str(i)} for r in TURN)]})
        for i in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    told = {}
    for layout in ("padded", "auto"):
        module = CausalLMModule(tmp_path, dtype="float32", lora=LoRAConfig(dropout=0.0))
        data = DataPipeline(tmp_path / "chats.jsonl", module.tokenizer, batch_size=40, train_split=1.0, layout=layout)
        told[layout] = Trainer(max_steps=1, log_every=1).fit(module, data), report_on(data)
    (padded, _), (shared, report) = told["padded"], told["auto"]
    assert shared.metrics["train/loss"] == pytest.approx(padded.metrics["train/loss"], rel=1e-5)
    assert shared.counts["tokens"] == padded.counts["tokens"] == report.epoch_tokens
    assert shared.counts["shared_tokens"] == report.shared_tokens > 0.5 * report.epoch_tokens
    assert shared.counts["positions"] == report.epoch_positions < 0.5 * padded.counts["positions"]
    assert 0 <= shared.metrics["perf/padding"] < 0.3
    assert f"{report.shared_tokens / report.epoch_tokens:.1%} of the tokens" in "\n".join(report.lines())
