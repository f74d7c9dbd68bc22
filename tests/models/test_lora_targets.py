"""Which layers get an adapter, and of which rank and scale: names, patterns, blocks, and what is refused."""

import logging
import re
import time
from contextlib import nullcontext
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from attrs import evolve
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.adapters import save_adapters
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import adapted_layers, inject_lora, rank_of
from tests.models.test_unpadded import LINEARS
from tests.tiny import tiny_mistral

LORA = LoRAConfig(rank=2, alpha=4.0, dropout=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of three blocks."""
    return tiny_mistral(tmp_path_factory.mktemp("model"), layers=3)


def adapted(folder: Path, **options: object) -> list[str]:
    """The paths of the layers with adapters, as short as they are clear."""
    model = inject_lora(load_model(folder, dtype="float32"), evolve(LORA, **options))
    return sorted(re.sub(r"model\.layers\.|self_attn\.|mlp\.", "", path) for path in adapted_layers(model))


def of_blocks(*names: str, blocks: tuple[int, ...] = (0, 1, 2)) -> list[str]:
    """Those names in each block."""
    return sorted(f"{block}.{name}" for block in blocks for name in names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, of_blocks("q_proj", "v_proj")),
        ({"target_modules": "all-linear"}, of_blocks(*LINEARS)),
        ({"target_modules": r".*\.(q|up)_proj"}, of_blocks("q_proj", "up_proj")),
        ({"target_modules": r"model\.layers\.[02]\.mlp\.down_proj"}, of_blocks("down_proj", blocks=(0, 2))),
        ({"target_modules": ["lm_head", "embed_tokens"]}, ["lm_head", "model.embed_tokens"]),
        ({"layers_to_transform": [1]}, of_blocks("q_proj", "v_proj", blocks=(1,))),
        ({"layers_to_transform": [0, 2], "target_modules": "all-linear"}, of_blocks(*LINEARS, blocks=(0, 2))),
        ({"layers_to_transform": [2], "target_modules": ".*[kv]_proj"}, of_blocks("k_proj", "v_proj", blocks=(2,))),
    ],
)
def test_targets(folder: Path, options: dict[str, object], expected: list[str]) -> None:
    """Names, the word for all but the head, an expression for whole paths, within the numbered blocks alone."""
    assert adapted(folder, **options) == expected


def test_block_ten_is_not_block_one(tmp_path: Path) -> None:
    """Numbers are compared as numbers."""
    tiny_mistral(tmp_path, layers=11)
    assert adapted(tmp_path, layers_to_transform=[1], target_modules=["q_proj"]) == ["1.q_proj"]


def test_all_linear_has_the_layers_of_experts_and_no_head(tmp_path: Path) -> None:
    """A router and three layers of experts, and neither the head nor the embedding, whatever they are called."""
    model = nn.Module()
    model.tokens, model.layers, model.out = nn.Embedding(96, 64), [nn.Module()], nn.Linear(64, 96)
    model.layers[0].router, model.layers[0].up = nn.Linear(64, 4), SwitchLinear(64, 96, 4)
    model.projector = nn.Linear(64, 32)
    inject_lora(model, evolve(LORA, target_modules="all-linear"))
    assert list(adapted_layers(model)) == ["layers.0.router", "layers.0.up", "projector"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": "q_proj"},
            r"'q_proj' matches the whole path of no layer, such as \S+\. Names stand in a list: \[q_proj\]",
        ),
        ({"target_modules": r".*\.no_proj"}, r"'\.\*\\\\\.no_proj' matches the whole path of no layer, such as \S+\.$"),
        ({"layers_to_transform": [0, 3]}, r"layers_to_transform has 3; this model's blocks are 0 to 2\."),
        ({"layers_to_transform": [0], "target_modules": ["lm_head"]}, r"no layer is called lm_head"),
        (
            {"rank_pattern": {"k_proj": 4}},
            r"lora\.rank_pattern: 'k_proj' matches none of the adapted layers, such as model\S+q_proj",
        ),
        ({"alpha_pattern": {"proj": 4}}, r"lora\.alpha_pattern: 'proj' matches none of the adapted layers"),
        (
            {"rank": 33, "init_lora_weights": "pissa"},
            r"v_proj can use, which has rank 32 at most: init_lora_weights pissa cannot",
        ),
    ],
)
def test_what_says_nothing_about_the_model_is_refused(folder: Path, options: dict[str, object], message: str) -> None:
    """With what the model has instead."""
    with pytest.raises(ModelError, match=message):
        adapted(folder, **options)


def test_a_tied_head_is_told_to_be_the_embedding(tmp_path: Path) -> None:
    """There is no layer of its own to adapt."""
    tiny_mistral(tmp_path, tied=True)
    with pytest.raises(ModelError, match=r"no layer is called lm_head\. The head is the embedding \(tied weights\)"):
        adapted(tmp_path, target_modules=["lm_head"])


def test_a_rank_that_a_layer_cannot_use_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """k_proj of two of four heads has 32 outputs."""
    with caplog.at_level(logging.WARNING, "mlx_trainer.models"):
        adapted(folder, rank=32, target_modules=["k_proj"])
        assert caplog.messages == []
        adapted(folder, rank=33, target_modules=["k_proj", "q_proj"])
    assert caplog.messages == [
        "lora.rank 33 is more than model.layers.0.self_attn.k_proj can use, which has rank 32 at most."
    ]


@pytest.mark.parametrize("bits", [3, 4])
def test_a_dora_that_mlx_lm_cannot_open_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int) -> None:
    """On 3, 5 and 6 bits its layer has another width than the base's; on others nothing is said, and it opens."""
    base, lora = tiny_mistral(tmp_path / "base", bits=bits), evolve(LORA, use_dora=True)
    with caplog.at_level(logging.WARNING, "mlx_trainer.models"):
        save_adapters(inject_lora(load_model(base, dtype="float32"), lora), tmp_path / "adapter", lora=lora)
    told = "mlx-lm cannot open DoRA on layers of 3 bits such as model.layers.0.self_attn.q_proj; "
    assert [message.startswith(told) for message in caplog.messages] == ([True] if bits == 3 else [])
    with pytest.raises(ValueError, match="shape") if bits == 3 else nullcontext():
        load(str(base), adapter_path=str(tmp_path / "adapter"))


PATTERNS = {
    "q_proj": {"q_proj": 8},
    r"layers\.1\.self_attn\..*": {r"layers\.1\.self_attn\..*": 8, "q_proj": 4},
    r"model.layers.\d.self_attn.q_proj": {r"model.layers.\d.self_attn.q_proj": 8},
    r"^model.*\.[02]\..*v_proj": {r"^model.*\.[02]\..*v_proj": 8},
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_mean_in_peft(folder: Path, pattern: str) -> None:
    """The first that matches the end of a path wins; ranks, alphas and scales of each layer are those of PEFT."""
    get_pattern_key = pytest.importorskip("peft.utils.other", reason="peft is a test extra").get_pattern_key
    patterns = PATTERNS[pattern]
    alphas = {key: value / 2 for key, value in patterns.items()}
    lora = evolve(LORA, rank_pattern=patterns, alpha_pattern=alphas, use_rslora=True)
    layers = adapted_layers(inject_lora(load_model(folder, dtype="float32"), lora))
    assert len({rank_of(layer) for layer in layers.values()}) > 1
    for path, layer in layers.items():
        key = get_pattern_key(patterns.keys(), path)
        rank, alpha = patterns.get(key, 2), alphas.get(key, 4.0)
        assert (rank_of(layer), layer.scale) == (rank, alpha / rank**0.5), path


PATH = "model.language_model.layers.27.block_sparse_moe.shared_expert.down_proj"
ENDLESS = {
    "a repeated group": r"(\w+\.?)+!",
    "with a blank before": r"(?x:(\w+\.?) +!)",
    "with a comment before": "(?x:(\\w+\\.?)#\n+!)",
    "counted": r"(\w+\.?){9,99}!",
    "alternatives": "(.|.)" * 40 + "!",
    "options": ".?" * 40 + "." * 40 + "!",
    "repetitions": ".*" * 9 + "!",
    "parentheses": "(" * 9999,
}


@pytest.mark.parametrize("option", ["target_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("case", ENDLESS)
def test_what_could_take_for_ever_is_refused(option: str, case: str) -> None:
    """By name, before any layer is looked at: but for the parentheses each would run for minutes, most for years."""
    pattern = ENDLESS[case]
    told = rf"lora\.{option} has {re.escape(repr(pattern)[:100])}, which could take for ever to match; write names"
    with pytest.raises(ValueError, match=told):
        LoRAConfig(**{option: pattern if option == "target_modules" else {pattern: 4}})


def test_many_patterns_may_cost_no_more_than_one() -> None:
    """Names of a thousand layers are no matter, a few hundred expressions are: what they cost together counts."""
    layers = {f"model.layers.{number}.self_attn.q_proj": 4 for number in range(1000)}
    assert LoRAConfig(rank_pattern=layers).rank_of("model.layers.999.self_attn.q_proj") == 4
    with pytest.raises(ValueError, match=r"rank_pattern has '\.\*\.\*\d+!', which could take for ever"):
        LoRAConfig(rank_pattern={f".*.*{number}!": 4 for number in range(1000)})


FREE = (
    r".*\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj",
    r"(?!.*vision).*\.(?:layers|blocks)\.(?:1\d|2[0-9]|3[01])\..*_proj",
    r"(model\.)?(language_model\.)?layers\.[0-9]{1,2}\.[^.]+\.\w+",
    "|".join(f"model.layers.{number}.mlp.up_proj" for number in range(224)),
)


@pytest.mark.parametrize("pattern", [*FREE, "(.|.)" * 21 + "!"])
def test_what_people_write_is_taken(pattern: str) -> None:
    """As targets and as a pattern; with the most that is taken too, a path that does not match is told in seconds."""
    lora = LoRAConfig(target_modules=pattern, rank_pattern={pattern: 4})
    start = time.perf_counter()
    lora.rank_of(f"{PATH}!")
    assert time.perf_counter() - start < 5


def test_the_blocks_that_are_left_out_compute_what_they_did(folder: Path) -> None:
    """With adapters moved on the last block alone, what reaches it is the base's, bit for bit."""
    model, ids = load_model(folder, dtype="float32"), mx.array([[1, 17, 300]])
    before = model.model.layers[1](model.model.layers[0](model.model.embed_tokens(ids)))
    inject_lora(model, evolve(LORA, layers_to_transform=[2]))
    for layer in adapted_layers(model).values():
        layer.lora_b = mx.ones(layer.lora_b.shape)
    after = model.model.layers[1](model.model.layers[0](model.model.embed_tokens(ids)))
    assert mx.array_equal(before, after).item()
