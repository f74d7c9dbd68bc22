"""The page on configuration and the recipe, held to what the code does. As a program: writes the page's table."""

import re
from pathlib import Path

from attrs import NOTHING, Attribute

from mlx_trainer.config import load_config, unwise
from mlx_trainer.config.keys import keys
from mlx_trainer.config.option import expected, show

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "configuration.md"


def table() -> str:
    """Return every key with its default, what it takes, and its help text, as Markdown."""
    rows = [
        f"| `{key}` | {_default(option)} | {expected(option)} | {_help(option)} |" for key, option in keys().items()
    ]
    return "\n".join(["| key | default | takes | |", "|---|---|---|---|", *rows, ""])


def _default(option: "Attribute[object]") -> str:
    return "required" if option.default is NOTHING else f"`{show(option.default)}`"


def _help(option: "Attribute[object]") -> str:
    return str(option.metadata["help"]).replace("|", "\\|")


def test_the_table_of_keys_is_what_the_schema_says() -> None:
    """Every key, default, range and help text of the page is the schema's."""
    assert PAGE.read_text(encoding="utf-8").split("-->\n\n")[1] == table()


def test_the_recipe_is_valid_wise_and_changes_nothing_but_what_it_says() -> None:
    """The YAML recipe loads without a warning, and its values are the defaults a newcomer is told about."""
    config = load_config(ROOT / "recipes" / "mistral_lora.yaml")
    assert unwise(config) == ()
    defaults = load_config(overrides={"data.dataset_path": "chats.jsonl"})
    assert (config.model, config.lora, config.training, config.data) == (
        defaults.model,
        defaults.lora,
        defaults.training,
        defaults.data,
    )
    assert config.run.directory == "runs/mistral-lora"


def test_the_errors_on_the_page_are_the_errors_one_gets(tmp_path: Path) -> None:
    """The page's example of an error is produced by what it describes."""
    from mlx_trainer.config import ConfigError

    (tmp_path / "base.yaml").write_text("lora: {rank: 1.7}\ndata: {dataset_path: a.jsonl}\n")
    (tmp_path / "recipe.yaml").write_text("extends: base.yaml\ntraining: {learning_rte: 1}\n")
    shown = re.findall(r"^(?:mlx-trainer: )?(\w+\.yaml: .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    try:
        load_config(tmp_path / "recipe.yaml")
        actual: list[str] = []
    except ConfigError as error:
        actual = str(error).replace(f"{tmp_path}/", "").split("\n")
    assert sorted(actual) == sorted(shown) != []


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text(encoding="utf-8").split("-->\n")[0] + "-->\n\n" + table(), encoding="utf-8")
