"""Configuration files: their order, their errors, and their limits."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from mlx_trainer.config import Config, ConfigError, DataConfig, deep_merge, load_config

Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, so that messages hold the short paths that a user types."""
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    """Write a file below the working folder and return its name."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def error_of(*paths: str, **overrides: object) -> str:
    """Return the error of loading these files; `lora__rank=8` overrides lora.rank."""
    with pytest.raises(ConfigError) as caught:
        load_config(*paths, overrides={key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


def test_a_file_changes_what_it_names_and_nothing_else() -> None:
    """YAML 1.2: 1e-4 is a number, and every option that is not named keeps its default."""
    path = write("recipe.yaml", "data:\n  dataset_path: chats.jsonl\ntraining:\n  learning_rate: 1e-4\n")
    plain = Config(data=DataConfig("chats.jsonl"))
    assert load_config(path) == evolve(plain, training=evolve(plain.training, learning_rate=1e-4))


def test_json_is_read_too() -> None:
    """A .json file says the same as a .yaml file."""
    path = write("recipe.json", '{"data": {"dataset_path": "a.jsonl"}, "lora": {"target_modules": ["o_proj"]}}')
    config = load_config(path)
    assert (config.data.dataset_path, config.lora.target_modules) == ("a.jsonl", ("o_proj",))


def test_defaults_then_bases_then_files_in_order_then_overrides() -> None:
    """Each layer wins over those before it, key by key; lists are replaced whole."""
    write("shared/base.yaml", "lora: {rank: 1, alpha: 1, dropout: 0.1, target_modules: [a, b]}\n")
    write("shared/middle.yaml", "extends: base.yaml\nlora: {alpha: 2, dropout: 0.2}\n")
    first = write("first.yaml", "extends: shared/middle.yaml\ndata: {dataset_path: x.jsonl}\nlora: {dropout: 0.25}\n")
    second = write("second.yaml", "lora: {target_modules: [c]}\ntraining:\n")
    config = load_config(first, second, overrides={"lora.alpha": 4})
    lora = config.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (1, 4.0, 0.25, ("c",))
    assert config.training == Config(data=DataConfig("x.jsonl")).training


def test_every_problem_is_told_at_once_with_its_file_key_value_and_range() -> None:
    """One run of the command shows all there is to repair, each line naming the file that holds the mistake."""
    write("base.yaml", "lora: {rank: 1.7}\nmodel: 5\n")
    path = write(
        "recipe.yaml",
        "extends: base.yaml\nlearning_rate: 1\nfoo: 1\n"
        "training: {learning_rte: 1e-4, epochs: 2, zzz: 3, rank: 1}\ndata: {shuffle: no}\n",
    )
    keys = (
        "known keys: method, adapter, batch_size, batch_tokens, gradient_accumulation_steps, num_epochs, max_steps, "
        "optimizer, schedule, learning_rate, warmup_steps, weight_decay, loraplus_lr_ratio, neftune_noise_alpha, "
        "ema_decay, trainable_layers, max_grad_norm, nan_patience, nan_rollback, loss_spike, recompute, save_steps, "
        "keep_last, keep_best, eval_steps, logging_steps"
    )
    assert sorted(error_of(path, data__seed=-1).split("\n")) == [
        "base.yaml: lora.rank is 1.7; it must be a whole number, at least 1",
        "base.yaml: model is 5; it must be a section of keys and values",
        "override: data.seed is -1; it must be a whole number, at least 0",
        "recipe.yaml: data.dataset_path is required: JSONL file, folder of train.jsonl and valid.jsonl, pattern or "
        "hf:owner/name; or several, also with weights",
        "recipe.yaml: data.shuffle is 'no'; it must be true or false",
        "recipe.yaml: foo is not a known key; known keys: model, lora, adalora, training, preference, data, "
        "evaluation, run",
        "recipe.yaml: learning_rate is not a known key; did you mean training.learning_rate?",
        "recipe.yaml: training.epochs is not a known key; did you mean num_epochs?",
        "recipe.yaml: training.learning_rte is not a known key; did you mean learning_rate?",
        "recipe.yaml: training.rank is not a known key; did you mean lora.rank?",
        f"recipe.yaml: training.zzz is not a known key; {keys}",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "lora: [rank\n", "a.yaml: line 2: expected ',' or ']', but got '<stream end>'"),
        (
            "a.yaml",
            "lora:\n  rank: 1\n  rank: 2\n",
            'a.yaml: line 3: found duplicate key "rank" with value "2" (original value: "1")',
        ),
        ("a.json", '{"lora": {"rank": 1, "rank": 2}}', "a.json: found duplicate key 'rank'"),
        ("a.json", '{"lora":\n 1,}', "a.json: line 2: Expecting property name enclosed in double quotes"),
        ("a.yaml", "- 1\n", "a.yaml: holds [1]; a configuration is a mapping of sections, such as `lora:`"),
        ("a.yaml", "", "a.yaml: holds null; a configuration is a mapping of sections, such as `lora:`"),
        ("a.yaml", "lora: {1: 2}\n", "a.yaml: the key 1 is not text"),
        ("a.yaml", "--- {}\n--- {}\n", "a.yaml: line 2: but found another document"),
        (
            "a.yaml",
            "lora: !!python/name:os.system\n",
            "a.yaml: line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
        ),
        (
            "a.yaml",
            "lora: !!python/object/apply:os.mkdir [canary]\n",
            "a.yaml: line 1: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.mkdir'",
        ),
        (
            "a.yaml",
            "extends: [b.yaml]\n",
            "a.yaml: extends is ['b.yaml']; it must be the path of one file, relative to this one",
        ),
        ("a.yaml", "extends: b.yaml\n", "b.yaml: there is no such file"),
        ("a.yaml", "#" * 1_000_001, "a.yaml: has more than 1,000,000 bytes, too many for a configuration"),
        ("a.yaml", "a: &a [*a]\n", "a.yaml: has more than 10,000 values once its aliases are followed"),
        ("a.yaml", "[" * 1000, "a.yaml: nested too deeply for a configuration"),
        ("a.json", "[" * 10000, "a.json: nested too deeply for a configuration"),
        ("a.txt", "", "a.txt: is not a configuration file; its name must end in .yaml, .yml or .json"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_by_name_and_line(name: str, text: str, message: str) -> None:
    """Broken syntax, duplicates, other shapes, code and oversized files: one line each, never a traceback."""
    assert error_of(write(name, text)) == message


def test_numbers_are_those_of_yaml_1_2_and_other_loaders_stay_as_they_were() -> None:
    """`1e-5` is a number here; the YAML package of everybody else still reads a text, and no code has run."""
    program = (
        "import yaml; from mlx_trainer.config import load_config; from mlx_trainer.models.loading import load_model\n"
        "resolvers = repr(yaml.SafeLoader.yaml_implicit_resolvers)\n"
        "rate = load_config('run.yaml', overrides={'data.dataset_path': 'x'}).training.learning_rate\n"
        "try: load_model(__import__('pathlib').Path('.'))\n"
        "except Exception as error: assert 'do not fit' in str(error), error\n"
        "print(rate == 1e-5, repr(yaml.safe_load('1e-5')), repr(yaml.SafeLoader.yaml_implicit_resolvers) == resolvers)"
    )
    write("run.yaml", "training: {learning_rate: 1e-5}\n")
    write("config.json", '{"model_type": "mistral"}')
    Path("model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "'1e-5'", "True"], done.stderr
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    "text",
    ["a: [" + "x, " * 20_000 + "]", "a: " + "{b: " * 900, "\n".join(f"k{n}: &a{n} v" for n in range(11_000))],
    ids=["long", "deep", "anchors"],
)
def test_much_of_anything_is_refused(text: str) -> None:
    """The pure parser reads about 100 kB a second, so that the largest file that is read takes ten."""
    assert error_of(write("a.yaml", text)).startswith("a.yaml: ")


def test_files_that_cannot_be_read_are_told_by_name() -> None:
    """A missing file, a folder and bytes that are no text."""
    assert error_of("none.yaml") == "none.yaml: there is no such file"
    Path("folder.yaml").mkdir()
    assert error_of("folder.yaml") == "folder.yaml: cannot be read: Is a directory"
    Path("bytes.yaml").write_bytes(b"a: \xff")
    assert error_of("bytes.yaml") == "bytes.yaml: is not UTF-8 text (byte 3)"


def test_a_circle_of_extends_is_refused_by_name() -> None:
    """The chain of files is shown as it was followed."""
    write("a.yaml", "extends: sub/b.yaml\n")
    write("sub/b.yaml", "extends: ../a.yaml\n")
    assert error_of("a.yaml") == "a.yaml: extends itself: a.yaml -> sub/b.yaml -> sub/../a.yaml"


def test_aliases_that_grow_without_end_are_refused_quickly() -> None:
    """Nine lines that stand for a billion values are refused after ten thousand."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert error_of(write("bomb.yaml", "\n".join(lines))) == (
        "bomb.yaml: has more than 10,000 values once its aliases are followed"
    )


def test_a_contradiction_is_told_with_the_file_that_wrote_it() -> None:
    """Rules between options name the file too, not only single values."""
    path = write("recipe.yaml", "data: {dataset_path: x}\nevaluation: {patience: 2}\n")
    assert error_of(path, data__train_split=1).startswith("recipe.yaml: evaluation.patience needs a held-out loss")


values = st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2)
sections = st.dictionaries(st.sampled_from("ab"), st.dictionaries(st.sampled_from("xyz"), values))


def test_a_mapping_is_replaced_whole_as_a_list_is() -> None:
    """A file's data, fields and roles stand for themselves; those of the file that it extends are not among them."""
    write("base.yaml", "data: {dataset_path: {a.jsonl: 1, b.jsonl: 2}, fields: {prompt: q}, roles: {bot: assistant}}\n")
    path = write("recipe.yaml", "extends: base.yaml\ndata: {dataset_path: {c.jsonl: 0.5}, fields: {text: t}}\n")
    data = load_config(path, overrides={"data.roles": {}}).data
    assert (data.dataset_path, data.fields, data.roles) == ({"c.jsonl": 0.5}, {"text": "t"}, {})


@given(lower=sections, upper=sections)
def test_merging_sections_is_a_union_in_which_the_later_wins(lower: Tree, upper: Tree) -> None:
    """Key by key the later tree's value stands, else the earlier one's; neither tree is changed."""
    before = repr((lower, upper))
    expected = {name: lower.get(name, {}) | upper.get(name, {}) for name in lower | upper}
    assert deep_merge(lower, upper) == expected
    assert repr((lower, upper)) == before


@given(tree=st.recursive(sections, lambda below: st.dictionaries(st.sampled_from("ab"), below), max_leaves=4))
def test_merging_with_nothing_or_with_itself_changes_nothing(tree: Tree) -> None:
    """The empty tree is neutral on either side, and merging is idempotent, however deep."""
    assert deep_merge(tree, {}) == deep_merge({}, tree) == deep_merge(tree, tree) == tree


def test_a_value_replaces_a_section_and_a_section_a_value() -> None:
    """Only two sections merge: a list or a number where the other has a section takes its place."""
    assert deep_merge({"a": {"x": 1}, "b": [1, 2]}, {"a": [3], "b": {"y": 4}}) == {"a": [3], "b": {"y": 4}}
