"""What was trained, opened again: its loss on other rows, and its answers."""

from pathlib import Path

import pytest

from mlx_trainer import build, cli, trained
from mlx_trainer.config import ConfigError
from mlx_trainer.models import ModelError
from mlx_trainer.models.adapter_config import lora_of
from tests.test_build import config, workplace  # noqa: F401 - where each test works, without asking


def test_evaluating_data_files_reads_each_row_once() -> None:
    """A weight is for training."""
    weighed = config(data__dataset_path={"chats.jsonl": 3})
    metrics = trained.evaluate(weighed, whole=True)
    assert (metrics.samples, metrics.loss) == (8, trained.evaluate(config(), whole=True).loss)


def test_evaluate_and_generate_read_the_adapter_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A trained adapter lowers the loss on what it learned, and changes what is generated."""
    build.train(config(run__directory="one", training__max_steps=8, training__learning_rate=3e-2, lora__dropout=0))
    capsys.readouterr()

    def loss(*arguments: str) -> float:
        model = ("--model", "base", "--model.dtype", "float32")
        assert cli.main(["evaluate", *arguments, *model]) == 0
        values = dict(line.split() for line in capsys.readouterr().out.splitlines())
        assert list(values) == ["loss", "perplexity", "rows"]
        assert values["rows"] == ("2" if "one/config.yaml" in arguments else "8")
        return float(values["loss"])

    assert loss("chats.jsonl", "--adapter", "one/adapter") < 0.9 * loss("chats.jsonl")
    assert loss("one/config.yaml", "--adapter", "one/adapter") > 0

    def answers(*arguments: str) -> str:
        model = ("--model", "base", "--model.dtype", "float32", "--max-tokens", "8")
        assert cli.main(["generate", "--prompt", "dog dog", *arguments, *model]) == 0
        return capsys.readouterr().out

    assert answers("--adapter", "one/adapter") != answers()


def test_fully_trained_weights_are_evaluated_too(capsys: pytest.CaptureFixture[str]) -> None:
    """After full fine-tuning the result is a folder named model, and evaluate takes it as it takes an adapter."""
    build.train(config(run__directory="full", training__method="full", training__learning_rate=1e-3))
    metrics = trained.evaluate(config(), "full/model", whole=True)
    assert metrics.loss < trained.evaluate(config(), whole=True).loss


def test_an_adapter_folder_that_is_none_is_told() -> None:
    """A folder without adapter_config.json, or with one that is no adapter's, is refused by its path."""
    with pytest.raises(ModelError) as caught:
        lora_of(Path("base"))
    expected = "base/adapter_config.json: No such file or directory; an adapter is a folder with this file"
    assert str(caught.value) == expected
    Path("base/adapter_config.json").write_text('{"fine_tune_type": "lora"}')
    with pytest.raises(ModelError, match="is not the configuration of an mlx-lm adapter: 'lora_parameters'"):
        lora_of(Path("base"))


def test_a_recipe_that_holds_nothing_back_cannot_be_evaluated() -> None:
    """The message says what to change."""
    with pytest.raises(ConfigError) as caught:
        trained.evaluate(config(data__train_split=1))
    assert str(caught.value) == "chats.jsonl: no row is held out; lower data.train_split"
