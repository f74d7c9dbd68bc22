"""One option: strict types and ranges, the same in Python as in a file."""

import pytest
from attrs import fields

from mlx_trainer.config import Config, ConfigError, DataConfig, LoRAConfig, ModelConfig, TrainingConfig
from mlx_trainer.config.keys import from_text, keys
from mlx_trainer.config.option import expected

REFUSED = [
    (LoRAConfig, {"rank": 0}, "rank is 0; it must be a whole number, at least 1"),
    (LoRAConfig, {"rank": 1.7}, "rank is 1.7; it must be a whole number, at least 1"),
    (LoRAConfig, {"rank": True}, "rank is true; it must be a whole number, at least 1"),
    (LoRAConfig, {"rank": "8"}, "rank is '8'; it must be a whole number, at least 1"),
    (LoRAConfig, {"rank": None}, "rank is null; it must be a whole number, at least 1"),
    (LoRAConfig, {"alpha": 0}, "alpha is 0.0; it must be a number, above 0"),
    (LoRAConfig, {"alpha": float("inf")}, "alpha is inf; it must be a number, above 0"),
    (LoRAConfig, {"alpha": float("nan")}, "alpha is nan; it must be a number, above 0"),
    (LoRAConfig, {"alpha": 2**53 + 1}, "alpha is 9007199254740993; it must be a number, above 0"),
    (
        TrainingConfig,
        {"learning_rate": 10**400},
        f"learning_rate is 1{'0' * 56}...; it must be a number, above 0 and at most 1",
    ),
    (LoRAConfig, {"dropout": 1}, "dropout is 1.0; it must be a number, at least 0 and below 1"),
    *[
        (
            LoRAConfig,
            {"target_modules": value},
            f"target_modules is {value}; it must be a list of text or text, not empty",
        )
        for value in ([], [7], ["a", ""])
    ],
    (LoRAConfig, {"target_modules": ""}, "target_modules is ''; it must be a list of text or text, not empty"),
    (
        LoRAConfig,
        {"target_modules": "*_proj"},
        "lora.target_modules has '*_proj', which is no regular expression: nothing to repeat at position 0",
    ),
    (
        LoRAConfig,
        {"rank_pattern": {"(q": 2}},
        "lora.rank_pattern has '(q', which is no regular expression: missing ), unterminated subpattern at position 0",
    ),
    *[
        (
            LoRAConfig,
            {"layers_to_transform": value},
            f"layers_to_transform is {value}; it must be a list of whole numbers, not empty, numbers at least 0, "
            "or null",
        )
        for value in ([], [-1], [1.0])
    ],
    *[
        (
            LoRAConfig,
            {"rank_pattern": value},
            f"rank_pattern is {value}; it must be a mapping of text to whole numbers, none of it empty, "
            "each at least 1",
        )
        for value in ({"q_proj": 0}, {"q_proj": 2.0}, {"": 2})
    ],
    (
        LoRAConfig,
        {"alpha_pattern": {"q_proj": 0}},
        "alpha_pattern is {'q_proj': 0.0}; it must be a mapping of text to numbers, none of it empty, each above 0",
    ),
    (ModelConfig, {"dtype": "int8"}, "dtype is 'int8'; it must be one of float16, bfloat16, float32"),
    (ModelConfig, {"model_name": ""}, "model_name is ''; it must be text, not empty"),
    (ModelConfig, {"max_seq_length": 7}, "max_seq_length is 7; it must be a whole number, at least 8"),
    (TrainingConfig, {"max_steps": 0}, "max_steps is 0; it must be a whole number, at least 1, or null"),
    (TrainingConfig, {"max_grad_norm": 0}, "max_grad_norm is 0.0; it must be a number, above 0, or null"),
    (TrainingConfig, {"weight_decay": -1}, "weight_decay is -1.0; it must be a number, at least 0 and at most 1"),
    (DataConfig, {"dataset_path": "a", "shuffle": "no"}, "shuffle is 'no'; it must be true or false"),
    (DataConfig, {"dataset_path": "a", "shuffle": 1}, "shuffle is 1; it must be true or false"),
    (
        DataConfig,
        {"dataset_path": "a", "train_split": 0},
        "train_split is 0.0; it must be a number, above 0 and at most 1",
    ),
    *[
        (
            DataConfig,
            {"dataset_path": path},
            f"dataset_path is {shown}; it must be text, a list of text or a mapping of text to numbers, not empty, "
            "weights above 0",
        )
        for path, shown in [
            (5, "5"),
            ([], "[]"),
            (["a.jsonl", 5], "['a.jsonl', 5]"),
            ({}, "{}"),
            ({"a.jsonl": 0}, "{'a.jsonl': 0.0}"),
            ({"a.jsonl": float("inf")}, "{'a.jsonl': inf}"),
            ({"a.jsonl": True}, "{'a.jsonl': True}"),
            ({"a.jsonl": "2"}, "{'a.jsonl': '2'}"),
            ({"": 1}, "{'': 1.0}"),
        ]
    ],
    *[
        (
            DataConfig,
            {"dataset_path": "a", "validation_path": path},
            f"validation_path is {shown}; it must be text or a list of text, not empty, or null",
        )
        for path, shown in [({"b.jsonl": 1}, "{'b.jsonl': 1}"), ([], "[]"), (["b.jsonl", ""], "['b.jsonl', '']")]
    ],
    *[
        (
            DataConfig,
            {"dataset_path": "a", "fields": fields},
            f"fields is {shown}; it must be a mapping of text to text, none of it empty",
        )
        for fields, shown in [
            ("prompt=q", "'prompt=q'"),
            (None, "null"),
            (["prompt", "q"], "['prompt', 'q']"),
            ({"prompt": 5}, "{'prompt': 5}"),
            ({"prompt": ""}, "{'prompt': ''}"),
        ]
    ],
    (
        DataConfig,
        {"dataset_path": "a", "truncation": "cut"},
        "truncation is 'cut'; it must be one of truncate, split, drop, error",
    ),
    (
        DataConfig,
        {"dataset_path": "a", "max_bad_share": 5},
        "max_bad_share is 5.0; it must be a number, at least 0 and at most 1",
    ),
    (DataConfig, {"dataset_path": "a", "max_shapes": 0}, "max_shapes is 0; it must be a whole number, at least 1"),
    (TrainingConfig, {"batch_tokens": 0}, "batch_tokens is 0; it must be a whole number, at least 1, or null"),
]


@pytest.mark.parametrize(("section", "values", "message"), REFUSED)
def test_a_wrong_value_is_refused_with_what_would_be_right(
    section: type, values: dict[str, object], message: str
) -> None:
    """Nothing is turned into something else, and a number out of range is told the range."""
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert str(caught.value) == message


def test_whole_numbers_stand_for_numbers_and_lists_are_stored_as_tuples() -> None:
    """The two conversions there are: 64 is 64.0 where a number is meant, and a list cannot be changed later."""
    lora = LoRAConfig(alpha=64, target_modules=["k_proj", "o_proj"])
    assert (type(lora.alpha), lora.alpha, lora.target_modules) == (float, 64.0, ("k_proj", "o_proj"))
    assert LoRAConfig(rank=8, alpha=20).scale == 2.5


def test_mappings_are_copied_and_whole_weights_are_numbers() -> None:
    """What a caller does to its mapping afterwards changes no configuration, and defaults are shared by none."""
    weights, names = {"a.jsonl": 2, "b.jsonl": 0.5}, {"prompt": "q"}
    data = DataConfig(weights, fields=names)
    weights.clear()
    names.clear()
    assert (data.dataset_path, data.fields) == ({"a.jsonl": 2.0, "b.jsonl": 0.5}, {"prompt": "q"})
    assert type(data.dataset_path["a.jsonl"]) is float  # type: ignore[call-overload, index]
    assert DataConfig("a").roles is not DataConfig("a").roles


def test_paths_are_told_without_their_weights() -> None:
    """However the data is given, the configuration lists its paths."""
    kinds: list[str | list[str] | dict[str, float]] = ["a", ["a"], ["a", "b"], {"a": 1, "b": 2}]
    assert [DataConfig(kind).train_paths for kind in kinds] == [("a",), ("a",), ("a", "b"), ("a", "b")]
    held_out = [DataConfig("a", validation_path=path).validation_paths for path in (None, "b", ["b", "c"])]
    assert held_out == [(), ("b",), ("b", "c")]


def test_the_names_and_defaults_that_recipes_rely_on() -> None:
    """The four sections that every recipe may use keep their names and defaults."""
    config = Config(data=DataConfig("chats.jsonl"))
    fixed = {
        "model.model_name": "mistralai/Mistral-7B-Instruct-v0.3",
        "model.cache_dir": "~/.cache/huggingface",
        "model.dtype": "float16",
        "model.max_seq_length": 2048,
        "lora.rank": 16,
        "lora.alpha": 32,
        "lora.dropout": 0.05,
        "lora.target_modules": ("q_proj", "v_proj"),
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.num_epochs": 3,
        "training.learning_rate": 2e-4,
        "training.warmup_steps": 100,
        "training.weight_decay": 0.01,
        "training.max_grad_norm": 1.0,
        "training.save_steps": 100,
        "training.eval_steps": 50,
        "training.logging_steps": 10,
        "data.dataset_path": "chats.jsonl",
        "data.train_split": 0.9,
        "data.shuffle": True,
        "data.seed": 42,
        "data.num_workers": 0,
    }
    actual = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in fixed}
    assert actual == fixed


def test_every_option_has_a_help_text_and_words_for_what_it_takes() -> None:
    """`--help`, the documentation and the errors have something to say about each option."""
    assert [key for key, option in keys().items() if not option.metadata["help"] or not expected(option)] == []
    assert [section.name for section in fields(Config)] == list(dict.fromkeys(key.split(".")[0] for key in keys()))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lora.rank", "8", 8),
        ("lora.rank", "8.0", "8.0"),
        ("lora.alpha", "8", 8.0),
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.learning_rate", "fast", "fast"),
        ("training.max_steps", "null", None),
        ("training.max_steps", "20", 20),
        ("lora.rank", "null", "null"),
        ("data.shuffle", "false", False),
        ("data.shuffle", "true", True),
        ("data.shuffle", "no", "no"),
        ("data.validation_path", "null", None),
        ("data.dataset_path", "1e-4", "1e-4"),
        ("data.dataset_path", "a,b.jsonl", "a,b.jsonl"),
        ("data.dataset_path", "[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("data.dataset_path", "{a.jsonl: 0.5, b.jsonl: 2}", {"a.jsonl": 0.5, "b.jsonl": 2}),
        ("data.dataset_path", "[ab]*.jsonl", "[ab]*.jsonl"),
        ("data.dataset_path", "{a", "{a"),
        ("data.validation_path", "[a.jsonl]", ["a.jsonl"]),
        ("data.validation_path", "{a.jsonl: 1}", "{a.jsonl: 1}"),
        ("model.model_name", "[a]", "[a]"),
        ("lora.target_modules", "q_proj,v_proj", ["q_proj", "v_proj"]),
        ("lora.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("lora.target_modules", "q_proj", ["q_proj"]),
        ("lora.target_modules", "[q_proj", "[q_proj"),
        ("lora.target_modules", "", []),
        ("lora.target_modules", "all-linear", "all-linear"),
        ("lora.target_modules", r".*\.[qv]_proj{1,1}", r".*\.[qv]_proj{1,1}"),
        ("lora.layers_to_transform", "0,3", [0, 3]),
        ("lora.layers_to_transform", "[0, 3]", [0, 3]),
        ("lora.layers_to_transform", "null", None),
        ("lora.rank_pattern", "{q_proj: 2}", {"q_proj": 2}),
        ("evaluation.sample_prompts", "Well, who are you?", ["Well, who are you?"]),
        ("evaluation.sample_prompts", '["Well, who?", why]', ["Well, who?", "why"]),
    ],
)
def test_command_line_text_is_read_by_the_type_of_its_option(key: str, text: str, value: object) -> None:
    """Text becomes the option's type; text that spells no such value stays text, for the strict reader to refuse."""
    assert from_text(text, keys()[key]) == value
    assert type(from_text(text, keys()[key])) is type(value)
