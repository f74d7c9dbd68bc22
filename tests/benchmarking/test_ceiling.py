"""The limit that matrix products set."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_trainer.benchmarking import ceiling as ceilings
from mlx_trainer.benchmarking import measuring
from mlx_trainer.benchmarking.ceiling import MatmulRate, ceiling, matmul_rate, weights_passed
from mlx_trainer.benchmarking.memory import memory_of, size_gb
from mlx_trainer.config import LoRAConfig, load_config
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import inject_lora
from tests.tiny import VOCABULARY, tiny_mistral

LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
"""q, k and v, o, and the three of the MLP."""


@pytest.mark.parametrize(("tied", "bits"), [(False, None), (True, None), (False, 4), (True, 4)])
def test_the_weights_that_tokens_go_through(tied: bool, bits: int | None, tmp_path: Path) -> None:
    """Linear layers without adapters, packed ones as what they stand for, and the head apart, tied or not."""
    model = load_model(tiny_mistral(tmp_path, tied=tied, bits=bits), dtype="float32")
    inject_lora(model, LoRAConfig(rank=4))
    assert weights_passed(model) == (2 * LAYER, 64 * VOCABULARY)


def test_a_mixture_of_experts_has_no_such_number() -> None:
    """Which weights a token goes through is the router's to say."""
    model = nn.Sequential(nn.Linear(4, 4))
    assert weights_passed(model) == (16, 0)
    model.layers[0].weight = mx.zeros((2, 4, 4))
    assert weights_passed(model) is None


def test_the_limit_and_how_much_of_it_is_reached() -> None:
    """Adapters: 4 FLOP a weight; full fine-tuning: 6. The head counts for the trained tokens, half of all here."""
    speeds = {"tokens_per_s": 100.0, "trained_tokens_per_s": 50.0, "positions_per_s": 125.0}
    rate = MatmulRate("float32", 1024, flop_per_s=1.2e6)
    found = ceiling(rate, (900, 200), "lora", **speeds)
    assert (found.flop_per_token, found.limit_tokens_per_s) == (4000, 300)
    assert (found.share, found.computed_share) == (100 / 300, 125 / 300)
    found = ceiling(rate, (900, 200), "full", **speeds)
    assert (found.flop_per_token, found.limit_tokens_per_s, found.share) == (6000, 200, 0.5)


@pytest.mark.parametrize(
    ("options", "flop"),
    [
        ({"training.method": "lora"}, 4),
        ({"training.method": "dpo"}, 6),
        ({"training.method": "dpo", "preference.precompute_ref_log_probs": True}, 4),
        ({"training.method": "orpo"}, 4),
    ],
)
def test_a_reference_counts_where_a_step_computes_it(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], flop: int
) -> None:
    """DPO's is two more, and nothing more where it was computed before."""
    monkeypatch.setattr(measuring, "weights_passed", lambda model: (900, 200))
    monkeypatch.setattr(measuring, "matmul_rate", lambda dtype: MatmulRate(dtype, 1024, flop_per_s=1.2e6))
    config = load_config(overrides={"data.dataset_path": "pairs.jsonl", **options})
    reached = SimpleNamespace(tokens_per_s=100.0, trained_tokens_per_s=50.0, positions_per_s=125.0)
    found = measuring.ceiling_of(config, SimpleNamespace(model=None), reached)
    assert found is not None
    assert found.flop_per_weight == flop


@pytest.mark.parametrize("streams", [1, 2])
def test_the_rate_is_that_of_the_quickest_product(monkeypatch: pytest.MonkeyPatch, streams: int) -> None:
    """Five times at least, and as many as a second holds, of a product on each stream that a step has."""
    monkeypatch.setattr(ceilings, "SIZES", {"cpu": 16})
    monkeypatch.setattr(ceilings, "streams", lambda: [None] * streams)
    moments = iter([0, 0.5, 1, 1.25, 2, 4, 5, 6, 7, 8])
    rate = MatmulRate("bfloat16", 16, streams * 2 * 16**3 / 0.25)
    assert matmul_rate("bfloat16", now=lambda: next(moments)) == rate
    moments = iter([i / 8 for i in range(100)])
    matmul_rate("float32", now=lambda: next(moments))
    assert next(moments) == 16 / 8


@pytest.mark.parametrize("adapters", [True, False])
def test_the_parts_of_the_peak(adapters: bool) -> None:
    """Weights, what trains beside them with the optimizer's state, and the rest are the peak."""
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 4))
    model.layers[0].freeze()
    state = {"step": mx.array(1), "moments": [mx.zeros((256, 8))]}
    mx.eval(model.parameters(), state)
    found = memory_of(model, state, adapters=adapters)
    first, second = 4 * (256 * 256 + 256), 4 * (256 * 4 + 4)
    optimizer = 4 * (256 * 8) + 4
    expected = (first, second + optimizer) if adapters else (first + second, optimizer)
    assert (round(found.weights_gb * 1e9), round(found.training_gb * 1e9)) == expected
    assert found.weights_gb + found.training_gb + found.step_gb == pytest.approx(found.peak_gb)
    assert size_gb(state) * 1e9 == pytest.approx(optimizer)
