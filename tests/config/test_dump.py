"""A configuration as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlx_trainer.config import Config, ConfigError, DataConfig, load_config, to_yaml
from mlx_trainer.config.keys import sections
from mlx_trainer.config.option import members
from mlx_trainer.config.valid import Filled, Range

# What YAML cannot hold at all is no part of the promise: control characters, lone surrogates.
text = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12) | st.sampled_from(
    ["no", "null", "~", "1e-4", "0x1", "- a", "a: b", "#", "'", '"', " lead", "trail ", "[a]", "2020-01-01", "=", "<<"]
)


def values(option: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that an option takes."""
    valid = option.metadata["valid"]
    bounds = valid if isinstance(valid, Range) else Range()
    low = bounds.at_least if bounds.at_least is not None else bounds.above
    high = bounds.at_most if bounds.at_most is not None else bounds.below
    strategies = {
        NoneType: st.none(),
        bool: st.booleans(),
        int: st.integers(low if low is None else int(low), 10**6),
        float: st.floats(
            low,
            high,
            exclude_min=bounds.above is not None,
            exclude_max=bounds.below is not None,
            allow_nan=False,
            allow_infinity=False,
        ),
        str: text,
    }
    fewest = 0 if isinstance(valid, Filled) else 1
    return st.one_of(*(_alternative(kind, strategies, fewest) for kind in members(option.type)))


def _alternative(kind: Any, strategies: dict[Any, st.SearchStrategy[Any]], fewest: int) -> st.SearchStrategy[Any]:
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is Sequence:
        items = text if get_args(kind)[0] is str else st.integers(0, 99)
        return st.lists(items, min_size=1, max_size=3).map(tuple)
    if get_origin(kind) is Mapping:
        numbers = {int: st.integers(1, 99), float: st.floats(0, exclude_min=True, allow_infinity=False)}
        items = numbers.get(get_args(kind)[1], text)
        return st.dictionaries(text, items, min_size=fewest, max_size=3)
    return strategies[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw a valid configuration, every option of it."""
    drawn = {
        name: {option.name: draw(values(option)) for option in section.__attrs_attrs__}
        for name, section in sections().items()
    }
    lora, adalora, training, data = drawn["lora"], drawn["adalora"], drawn["training"], drawn["data"]
    # What options ask of one another, so that few draws are refused.
    if training["method"] != "lora":
        adalora["target_r"] = None
    if training["method"] == "full":
        training["loraplus_lr_ratio"] = training["adapter"] = None
        drawn["model"]["dtype"] = "float32"
    if training["method"] in ("dpo", "orpo"):
        training["neftune_noise_alpha"] = None
    if data["layout"] == "padded":
        training["recompute"] = "none"
    if data["validation_path"] == data["dataset_path"]:
        data["validation_path"] = None
    if drawn["preference"]["loss_type"] != "sigmoid":
        drawn["preference"]["label_smoothing"] = 0.0
    if lora["layers_to_transform"] is not None:
        training["trainable_layers"] = None
    if adalora["target_r"] is not None:
        lora |= {"rank": max(lora["rank"], adalora["target_r"]), "use_dora": False, "init_lora_weights": "default"}
        training |= {"ema_decay": None, "max_steps": None, "adapter": None}
    try:
        return Config(**{name: section(**drawn[name]) for name, section in sections().items()})
    except ConfigError:
        assume(False)
        raise


@settings(max_examples=40, deadline=None)
@given(config=configs())
def test_a_dumped_configuration_loads_back_equal(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the options hold, the text says exactly that, and says it the same way twice."""
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert to_yaml(load_config(path)) == to_yaml(config)


def test_paths_with_weights_keep_their_order() -> None:
    """The order of the sources, which decides the plan, is the one that was written."""
    dumped = to_yaml(Config(data=DataConfig({"z.jsonl": 2, "a.jsonl": 0.5}, fields={"prompt": "q", "completion": "a"})))
    assert "  dataset_path:\n    z.jsonl: 2.0\n    a.jsonl: 0.5\n" in dumped
    assert "  fields:\n    prompt: q\n    completion: a\n  roles: {}\n" in dumped


def test_the_text_names_every_option_in_the_order_of_the_schema(tmp_path: Path) -> None:
    """The dump of the defaults begins as the schema does, with YAML's own words for true, false and null."""
    dumped = to_yaml(Config(data=DataConfig("chats.jsonl")))
    assert dumped.splitlines()[:11] == [
        "model:",
        "  model_name: mistralai/Mistral-7B-Instruct-v0.3",
        "  cache_dir: ~/.cache/huggingface",
        "  revision: null",
        "  dtype: float16",
        "  max_seq_length: 2048",
        "  trust_remote_code: false",
        "  verify: false",
        "lora:",
        "  rank: 16",
        "  alpha: 32.0",
    ]
    assert {"  max_steps: null", "  shuffle: true", "  sample_prompts: []"} <= set(dumped.splitlines())
