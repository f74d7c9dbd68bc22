"""Combining adapters: each method equals its definition written out in NumPy, and mlx-lm opens the result."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.export.merging.adapter import read_adapter
from mlx_trainer.export.merging.combine import METHODS, combine
from mlx_trainer.export.merging.merge import merge
from mlx_trainer.models.error import ModelError
from tests.export.random_adapters import ROWS, random_adapter
from tests.tiny import tiny_mistral

WEIGHTS = (0.7, -0.4)
Q, DOWN, UP = (f"model.layers.1.{name}_proj" for name in ("self_attn.q", "mlp.down", "mlp.up"))
Array = np.ndarray[Any, Any]


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two adapters of different ranks, scales and targets on one base: one has q and down, the other down and up."""
    base = tiny_mistral(tmp_path / "base")
    return [
        random_adapter(base, tmp_path / "a", ["self_attn.q_proj", "mlp.down_proj"], rank=4, scale=1.5, seed=1),
        random_adapter(base, tmp_path / "b", ["mlp.down_proj", "mlp.up_proj"], rank=3, scale=0.5, seed=2),
    ]


def deltas(adapter: Path) -> dict[str, Array]:
    """The update of each layer, (in, out), written out from the files."""
    tensors = {
        name: np.array(value, np.float64) for name, value in mx.load(str(adapter / "adapters.safetensors")).items()
    }
    scale = json.loads((adapter / "adapter_config.json").read_text())["lora_parameters"]["scale"]
    paths = sorted({name.rpartition(".")[0] for name in tensors})
    return {path: scale * tensors[f"{path}.lora_a"] @ tensors[f"{path}.lora_b"] for path in paths}


def weighted(pair: Sequence[Path], weights: Sequence[float] = WEIGHTS) -> dict[str, list[Array]]:
    """The weighted updates of each layer, by path."""
    found: dict[str, list[Array]] = {}
    for adapter, weight in zip(pair, weights, strict=True):
        for path, delta in deltas(adapter).items():
            found.setdefault(path, []).append(weight * delta)
    return found


def truncated(delta: Array, rank: int) -> Array:
    """The nearest of a rank, by the textbook."""
    u, s, v = np.linalg.svd(delta)
    kept: Array = (u[:, :rank] * s[:rank]) @ v[:rank]
    return kept


def ties(terms: Sequence[Array], density: float) -> Array:
    """Trim, elect sign, disjoint merge: one value at a time."""
    thresholds = [np.sort(np.abs(term), axis=None)[-int(density * term.size)] for term in terms]
    result = np.zeros_like(terms[0])
    for at in itertools.product(*map(range, result.shape)):
        kept = [term[at] if abs(term[at]) >= least else 0.0 for term, least in zip(terms, thresholds, strict=True)]
        agreeing = [value for value in kept if value * sum(kept) > 0]
        result[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("cat", {}, lambda terms: sum(terms)),
        ("linear", {}, lambda terms: sum(terms)),
        ("svd", {"rank": 2}, lambda terms: truncated(sum(terms), 2)),
        ("ties", {"rank": 5, "density": 0.3}, lambda terms: truncated(ties(terms, 0.3), 5)),
    ],
)
def test_each_method_is_its_definition(
    tmp_path: Path, pair: list[Path], method: str, options: dict[str, Any], expected: Callable[[list[Array]], Array]
) -> None:
    """Layer by layer, for two adapters with different ranks, scales and targets, one of them subtracted."""
    result = combine(pair, tmp_path / "sum", WEIGHTS, method, **options)
    actual = deltas(result.directory)
    terms = weighted(pair)
    assert actual.keys() == terms.keys()
    assert {Q, DOWN, UP} <= actual.keys()
    for path, layer in terms.items():
        np.testing.assert_allclose(actual[path], expected(layer), atol=1e-6, rtol=0, err_msg=path)


@pytest.mark.parametrize(("method", "rank"), [("svd", 2), ("svd", 6), ("ties", 3)])
def test_the_error_that_is_told_is_the_one_there_is(tmp_path: Path, pair: list[Path], method: str, rank: int) -> None:
    """‖difference‖ / ‖update‖ over all layers; a rank below the sum's costs something, the next one less."""
    target = {path: ties(terms, 0.5) if method == "ties" else sum(terms) for path, terms in weighted(pair).items()}
    result = combine(pair, tmp_path / "sum", WEIGHTS, method, rank=rank)
    actual = deltas(result.directory)
    lost = sum(np.linalg.norm(actual[path] - delta) ** 2 for path, delta in target.items())
    size = sum(np.linalg.norm(delta) ** 2 for delta in target.values())
    assert result.error == pytest.approx((lost / size) ** 0.5, rel=1e-4)
    assert result.rank == rank
    assert result.error > 0.01
    assert str(result).endswith(f"{100 * result.error:.3g} % off what a full rank would hold.")


def test_cat_adds_ranks_and_linear_needs_no_more_than_the_sum_has(tmp_path: Path, pair: list[Path]) -> None:
    """Half an adapter and half of it again: twice the rank, and once."""
    assert combine(pair, tmp_path / "cat", method="cat").rank == 4 + 3
    twice = [pair[0], pair[0]]
    assert combine(twice, tmp_path / "twice", [0.5, 0.5], "cat").rank == 8
    linear = combine(twice, tmp_path / "linear", [0.5, 0.5])
    assert (linear.rank, linear.error) == (4, pytest.approx(0, abs=1e-6))
    for path, delta in deltas(linear.directory).items():
        np.testing.assert_allclose(delta, deltas(pair[0])[path], atol=1e-6)
    assert str(linear).endswith("exact.")


def test_adapter_arithmetic(tmp_path: Path, pair: list[Path]) -> None:
    """A + B - B = A, A - A = 0, and a single adapter can be scaled or brought to a lower rank."""
    both = combine(pair, tmp_path / "both").directory
    again = deltas(combine([both, pair[1]], tmp_path / "again", [1, -1]).directory)
    first = deltas(pair[0])
    for path, delta in again.items():
        np.testing.assert_allclose(delta, first.get(path, 0), atol=2e-6)
    nothing = deltas(combine([pair[0], pair[0]], tmp_path / "nothing", [1, -1]).directory)
    assert max(np.abs(delta).max() for delta in nothing.values()) < 1e-6
    assert combine(pair[:1], tmp_path / "small", method="svd", rank=1).rank == 1


def test_dare_keeps_a_share_and_rescales_it(tmp_path: Path, pair: list[Path]) -> None:
    """At full rank each value is either 0 or twice what it was; other seeds keep others, the same seed the same."""
    runs = [
        deltas(combine(pair[:1], tmp_path / f"dare-{i}", method="dare", rank=64, density=0.5, seed=seed).directory)[Q]
        for i, seed in enumerate((0, 0, 1))
    ]
    whole = deltas(pair[0])[Q]
    kept = np.abs(runs[0]) > 1e-5
    assert 0.45 < kept.mean() < 0.55
    np.testing.assert_allclose(runs[0], np.where(kept, 2 * whole, 0), atol=2e-5)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (np.abs(runs[2]) > 1e-5).mean() == pytest.approx(0.5, abs=0.05)
    assert np.abs(runs[0] - runs[2]).max() > 0.01


def test_density_and_rank_change_what_they_say(tmp_path: Path, pair: list[Path]) -> None:
    """The default rank is the highest among the adapters; a lower density keeps less."""
    results = {
        density: combine(pair, tmp_path / f"{density}", method="ties", density=density) for density in (0.1, 0.9)
    }
    assert {result.rank for result in results.values()} == {4}
    sizes = [sum(np.linalg.norm(delta) for delta in deltas(result.directory).values()) for result in results.values()]
    assert sizes[0] < 0.9 * sizes[1]


@pytest.mark.parametrize("method", METHODS)
def test_mlx_lm_opens_the_result_and_it_merges(tmp_path: Path, pair: list[Path], method: str) -> None:
    """The folder is an adapter like any other: the merged model has the base plus the combined update, in mlx-lm."""
    result = combine(pair, tmp_path / "sum", WEIGHTS, method)
    assert merge(result.directory, tmp_path / "merged", rows=ROWS).lost < 1e-4
    assert read_adapter(result.directory).base == str(tmp_path / "base")


@pytest.mark.parametrize(("method", "theirs"), [("cat", "cat"), ("svd", "svd"), ("ties", "ties_svd")])
def test_real_peft_combines_to_the_same(tmp_path: Path, method: str, theirs: str) -> None:
    """`add_weighted_adapter` of the same two adapters with equal weights, for one layer."""
    peft = pytest.importorskip("peft", reason="PEFT itself is asked; extra `interop`")
    torch = pytest.importorskip("torch", reason="PEFT needs torch")
    base = tiny_mistral(tmp_path / "base")
    pair = [random_adapter(base, tmp_path / name, ["mlp.down_proj"], scale=2.0, seed=i) for i, name in enumerate("ab")]
    model = peft.get_peft_model(
        torch.nn.ModuleDict({"down_proj": torch.nn.Linear(128, 64, bias=False)}),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"]),
        adapter_name="0",
    )
    model.add_adapter("1", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"]))
    layer = model.base_model.model["down_proj"]
    for name, adapter in enumerate(pair):
        update = read_adapter(adapter).layers[DOWN]
        layer.lora_A[str(name)].weight.data = torch.tensor(np.array(update.a).T.copy())
        layer.lora_B[str(name)].weight.data = torch.tensor(np.array(update.b).T.copy())
    options = {"density": 0.3} if method == "ties" else {}
    peft_rank = {"svd_rank": 3} if method != "cat" else {}
    model.base_model.add_weighted_adapter(["0", "1"], [0.6, 0.6], "both", theirs, **peft_rank, **options)
    result = combine(pair, tmp_path / "sum", [0.6, 0.6], method, **({"rank": 3} if method != "cat" else {}), **options)
    expected = layer.get_delta_weight("both").detach().numpy().T
    np.testing.assert_allclose(deltas(result.directory)[DOWN], expected, atol=1e-5)


def test_embeddings_can_be_combined(tmp_path: Path) -> None:
    """Their factors stand the other way round, which a sum does not see."""
    base = tiny_mistral(tmp_path / "base")
    pair = [random_adapter(base, tmp_path / name, ["model.embed_tokens"], seed=i) for i, name in enumerate("ab")]
    result = combine(pair, tmp_path / "sum", WEIGHTS, "svd", rank=8)
    assert result.error == pytest.approx(0, abs=1e-6)
    assert merge(result.directory, tmp_path / "merged", rows=ROWS).lost < 1e-4


def test_what_cannot_be_combined_is_refused_by_name(tmp_path: Path, pair: list[Path]) -> None:
    """Other bases, other shapes, DoRA, and options that are wrong or would do nothing; nothing is left."""
    other = random_adapter(tiny_mistral(tmp_path / "other-base", seed=1), tmp_path / "other")
    small = random_adapter(tiny_mistral(tmp_path / "small-base", hidden_size=32), tmp_path / "small")
    config = json.loads((small / "adapter_config.json").read_text()) | {"model": None}
    (small / "adapter_config.json").write_text(json.dumps(config))
    dora = random_adapter(tmp_path / "base", tmp_path / "dora", dora=True)
    before, new = sorted(path.name for path in tmp_path.iterdir()), tmp_path / "sum"
    for message, call in {
        "other is for .*other-base": lambda: combine([pair[0], other], new),
        "small: .* is .* to .*, in another adapter": lambda: combine([pair[0], small], new),
        "dora has DoRA's magnitudes": lambda: combine([pair[0], dora], new),
        "a exists already": lambda: combine(pair, pair[0]),
        "There are 2 adapters and 1 weights": lambda: combine(pair, new, [1.0]),
        "must be finite": lambda: combine(pair, new, [1.0, float("nan")]),
        "method 'slerp' is unknown; it is one of cat, linear": lambda: combine(pair, new, method="slerp"),
        "rank 3: svd, ties and dare take one": lambda: combine(pair, new, method="cat", rank=3),
        "rank 0: svd": lambda: combine(pair, new, method="svd", rank=0),
        "density 0.5: ties and dare": lambda: combine(pair, new, method="svd", density=0.5),
        "density 0: ties and dare": lambda: combine(pair, new, method="ties", density=0.0),
        "seed 1: dare takes one": lambda: combine(pair, new, seed=1),
        "holds no adapter": lambda: combine([tmp_path / "base"], new),
    }.items():
        with pytest.raises(ModelError, match=message):
            call()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
