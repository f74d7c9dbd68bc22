"""Losses and gradients of batches of pairs are those of a loss that is written out row by row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import pytest
from attrs import frozen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_trainer import runtime
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.models import ModelError, head
from mlx_trainer.models.loading import load_model
from mlx_trainer.preference import DPOModule, ORPOModule, PreferenceModule
from mlx_trainer.traced import from_tree, to_tree
from tests.preference.pairs import (
    LINEARS,
    Sides,
    assert_close,
    expected,
    found,
    pairs_of,
    shape_of,
    sizes_before,
    written_out,
)
from tests.tiny import tiny_mistral

BETA = 0.3


def log_sigmoid(x: mx.array) -> mx.array:
    return -mx.log(1 + mx.exp(-x))


def ratios(which: int, *sides: Sides) -> mx.array:
    """Of sums (0) or means (1): how much more the chosen answer gained on the base than the rejected one."""
    chosen, rejected, base_chosen, base_rejected = (side[which] for side in sides)
    return (chosen - base_chosen) - (rejected - base_rejected)


def sigmoid(*sides: Sides) -> mx.array:
    return -log_sigmoid(BETA * ratios(0, *sides))


def smoothed(*sides: Sides) -> mx.array:
    margin = BETA * ratios(0, *sides)
    return -0.8 * log_sigmoid(margin) - 0.2 * log_sigmoid(-margin)


def ipo(*sides: Sides) -> mx.array:
    return (ratios(1, *sides) - 1 / (2 * BETA)) ** 2


def hinge(*sides: Sides) -> mx.array:
    return mx.maximum(0, 1 - BETA * ratios(0, *sides))


def orpo(chosen: Sides, rejected: Sides, *base: Sides) -> mx.array:
    odds = [mean - mx.log(1 - mx.exp(mean)) for _, mean in (chosen, rejected)]
    return -chosen[1] - 0.7 * log_sigmoid(odds[0] - odds[1])


@frozen
class Case:
    loss: Callable[..., mx.array]
    kind: type[PreferenceModule]
    options: dict[str, Any]


CASES = {
    "sigmoid": Case(sigmoid, DPOModule, {"beta": BETA}),
    "smoothed": Case(smoothed, DPOModule, {"beta": BETA, "label_smoothing": 0.2}),
    "ipo": Case(ipo, DPOModule, {"beta": BETA, "loss_type": "ipo"}),
    "hinge": Case(hinge, DPOModule, {"beta": BETA, "loss_type": "hinge"}),
    "orpo": Case(orpo, ORPOModule, {"orpo_lambda": 0.7}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mistral(tmp_path_factory.mktemp("model"), hidden_size=32)


@pytest.fixture(scope="module")
def base(folder: Path) -> nn.Module:
    """The base, loaded on its own."""
    return load_model(folder, dtype="float32")


def module_of(folder: Path, name: str, **options: Any) -> PreferenceModule:
    """A module that trains, whose adapters are not zero."""
    lora = LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS)
    module = CASES[name].kind(folder, dtype="float32", lora=lora, **CASES[name].options, **options)
    for _, values in tree_flatten(module.model.trainable_parameters()):
        values[:] = mx.random.normal(values.shape, key=mx.random.key(values.size)) * 0.05
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def modules(folder: Path) -> dict[str, PreferenceModule]:
    return {name: module_of(folder, name) for name in CASES}


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 16), st.integers(1, 16)), min_size=1, max_size=4)


@pytest.mark.parametrize("name", CASES)
@given(sizes=SIZES, spare=st.integers(0, 2), seed=st.integers(0, 3), part=st.sampled_from((16, 1 << 25)))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_equals_the_loss_written_out(
    modules: dict[str, PreferenceModule],
    base: nn.Module,
    name: str,
    sizes: list[tuple[int, int, int]],
    spare: int,
    seed: int,
    part: int,
) -> None:
    """Shared, unshared and padded, with pairs and positions to spare, prompts of one token, logits in parts or not."""
    rows, module = pairs_of(sizes, seed), modules[name]
    prefix = min(prompt for prompt, _, _ in sizes) - 1
    with patch.object(runtime, "linux_cpu", lambda: False), patch.object(head, "LOGITS_AT_ONCE", part):
        loss, gradients = expected(module, base, rows, CASES[name].loss)
        likely, steepest = sizes_before(module, rows)
        predictions = sum(row.trained_tokens for row in rows) + 1
        batches = [collate_unpadded(rows, shape_of(rows, p, spare), predictions) for p in sorted({0, prefix})]
        for batch in (*batches, collate(rows, shape_of(rows, 0, spare))):
            total, weight, ours, _ = found(module, batch)
            assert (weight, batch.metadata.pairs) == (len(sizes), len(sizes))
            assert total == pytest.approx(loss, rel=1e-5, abs=1e-7 * likely)
            assert_close(ours, gradients, BETA * steepest)


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_written_out(modules: dict[str, PreferenceModule], base: nn.Module, name: str) -> None:
    """Log-probabilities, and as rewards β times what they gained on the base, for ORPO λ times their means."""
    rows, module = pairs_of([(4, 3, 7), (2, 9, 5), (6, 1, 8)]), modules[name]
    metrics = found(module, collate(rows, shape_of(rows)))[3]
    which = 1 if name in ("ipo", "orpo") else 0  # of means, or of sums
    rewards = {}
    for side, own in (("chosen", rows[::2]), ("rejected", rows[1::2])):
        ours, theirs = ([written_out(model, row) for row in own] for model in (module.model, base))
        assert metrics[f"logps/{side}"] == pytest.approx(sum(one[0].item() for one in ours), rel=1e-5)
        gained = [one[which] - (0 if name == "orpo" else other[which]) for one, other in zip(ours, theirs, strict=True)]
        rewards[side] = [(0.7 if name == "orpo" else BETA) * one.item() for one in gained]
        assert metrics[f"rewards/{side}"] == pytest.approx(sum(rewards[side]), rel=1e-4)
    margins = [one - other for one, other in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    assert metrics["rewards/margins"] == pytest.approx(sum(margins), rel=1e-4)
    assert metrics["rewards/accuracies"] == sum(margin > 0 for margin in margins)


def test_the_reference_is_the_base_bit_for_bit(folder: Path, base: nn.Module) -> None:
    """In training mode, with adapters and dropout, the reference is what the base alone says; then all is as before."""
    module = module_of(folder, "sigmoid")
    alone = DPOModule(folder, dtype="float32")
    alone._model = base
    lora = LoRAConfig(rank=4, dropout=0.5, target_modules=LINEARS)
    dropping = DPOModule(folder, dtype="float32", lora=lora)
    rows = pairs_of([(9, 5, 7), (6, 3, 11)])
    for batch in (collate_unpadded(rows, shape_of(rows, 5), 30), collate(rows, shape_of(rows))):
        traced = from_tree(to_tree(batch))
        before = dict(tree_flatten(module.model.parameters()))
        base.eval()
        theirs = alone.score(traced).log_probabilities.tolist()
        for each in (module, dropping):
            each.model.train()
            assert each.reference(traced).tolist() == theirs
            assert each.model.training
        assert module.score(traced).log_probabilities.tolist() != theirs
        assert dict(tree_flatten(module.model.parameters())).keys() == before.keys()


def test_a_packed_base_is_its_own_reference(tmp_path: Path) -> None:
    """The packed weights themselves are used: what they say without adapters, to the rounding of another kernel."""
    folder = tiny_mistral(tmp_path, hidden_size=32, bits=4)
    rows = pairs_of([(9, 5, 7), (6, 3, 11)])
    traced = from_tree(to_tree(collate_unpadded(rows, shape_of(rows, 5), 30)))
    packed = load_model(folder, dtype="float32")
    expected = [written_out(packed, row)[0].item() for row in rows]
    assert module_of(folder, "sigmoid").reference(traced).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_reference_needs_a_frozen_base(folder: Path) -> None:
    """Where more than adapters trains, or all, there is nothing to compare with."""
    rows = pairs_of([(4, 3, 2)])
    batch = from_tree(to_tree(collate(rows, shape_of(rows))))
    with pytest.raises(ModelError, match=r"full fine-tuning \(lora=None\) overwrites: call precompute_reference"):
        DPOModule(folder, dtype="float32", lora=None).training_loss(batch)
    module = module_of(folder, "sigmoid")
    module.model.model.norm.unfreeze()
    with pytest.raises(ModelError, match=r"model\.norm\.weight trains beside the adapters"):
        module.training_loss(batch)


def test_orpo_trains_all_weights(folder: Path) -> None:
    """It needs no reference, so that full fine-tuning has gradients for every weight."""
    module = ORPOModule(folder, dtype="float32", lora=None)
    module.setup("fit")
    rows = pairs_of([(4, 3, 2), (2, 5, 1)])
    _, _, gradients, _ = found(module, collate_unpadded(rows, shape_of(rows), 20))
    assert all(mx.abs(value).max().item() > 0 for value in gradients.values())


def test_an_empty_batch_weighs_nothing(modules: dict[str, PreferenceModule]) -> None:
    """A rank without pairs adds zero over nothing, and its gradient is zero."""
    rows = pairs_of([(4, 3, 2)])
    for module in modules.values():
        for batch in (collate_unpadded([], shape_of(rows, 2), 5), collate([], shape_of(rows))):
            total, weight, gradients, _ = found(module, batch)
            assert (total, weight) == (0, 0)
            assert all(mx.abs(value).max().item() == 0 for value in gradients.values())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"loss_type": "sigmod"}, "'sigmod' is unknown; it is one of sigmoid, ipo, hinge"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5; it must be at least 0 and below 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, 'belongs to loss_type "sigmoid"; "ipo" has none'),
    ],
)
def test_options_out_of_range_are_refused(folder: Path, options: dict[str, Any], error: str) -> None:
    """Each with what would be right."""
    with pytest.raises(ModelError, match=error):
        DPOModule(folder, **options)


def test_options_of_others_are_refused(folder: Path) -> None:
    """A negative weight of the odds, and noise that is for another loss."""
    with pytest.raises(ModelError, match="orpo_lambda is -1; it must be 0 or more"):
        ORPOModule(folder, orpo_lambda=-1)
    for kind in (DPOModule, ORPOModule):
        with pytest.raises(ModelError, match="neftune_noise_alpha is for next-token training"):
            kind(folder, neftune_noise_alpha=5.0)
