"""The model card: what a run tells, what is left out, and that nothing written elsewhere can break it."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from mlx_trainer.commands import COMMANDS
from mlx_trainer.export.publishing.card import Card, hub_base, model_card
from mlx_trainer.export.publishing.contents import contents_of
from mlx_trainer.export.publishing.run import run_of
from tests.export.folders import BASE, COMMIT, adapter, peft, run
from tests.hub_files import OWNER

NAME = "owner/tiny-chat"


def card_of(folder: Path, **given: Any) -> Card:
    """The card of what lies in a folder."""
    contents, told = contents_of(folder), run_of(folder)
    return model_card(contents, NAME, told, base=hub_base(contents, told), **given)


def test_the_card_tells_what_the_run_wrote_down(tmp_path: Path) -> None:
    """Base with its commit, data, figures, options and versions; only the last loss is the result."""
    card = card_of(run(tmp_path), license="apache-2.0", language=["en", "de"])
    data = ModelCard(card.text).data
    assert card.notes == []
    result = {"task_type": "text-generation", "dataset_type": "someone/chats", "dataset_name": "someone/chats"}
    assert [{key: getattr(found, key) for key in result} for found in data.eval_results] == [result, result]
    assert {found.metric_type: found.metric_value for found in data.eval_results} == {"loss": 1.5, "perplexity": 3.0}
    known = {key: value for key, value in data.to_dict().items() if key != "model-index"}
    assert known == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "lora", "mlx-trainer"],
        "license": "apache-2.0",
        "language": ["en", "de"],
        "datasets": ["someone/chats"],
    }
    for line in (
        f"[{BASE}](https://huggingface.co/{BASE}) at commit `{COMMIT}`",
        "| loss | 1.5 | 1.25 |",
        "| tokens | 1,234,567 |",
        "| rank | 4 |",
        "| learning\\_rate | 0.0002 |",
        "| target\\_modules | q\\_proj, v\\_proj |",
        "| mlx | 0.32.4 |",
    ):
        assert line in card.text


def test_what_was_not_measured_is_not_claimed(tmp_path: Path) -> None:
    """Without a run there are no figures, a loss that is no number is none, license and language are not guessed."""
    bare = card_of(adapter(tmp_path / "bare"))
    assert set(ModelCard(bare.text).data.to_dict()) == {
        "base_model", "base_model_relation", "library_name", "pipeline_tag", "tags",
    }  # fmt: skip
    assert [line for line in bare.text.splitlines() if line.startswith("#")] == ["# tiny-chat", "## How to use"]
    assert bare.notes == ["the card names no license: give --license"]
    folder = run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "val/loss": "NaN"}\n')
    assert "model-index" not in ModelCard(card_of(folder).text).data.to_dict()


def test_a_checkpoint_knows_its_run_and_full_weights_are_no_adapter(tmp_path: Path) -> None:
    """Two levels below the run's folder; weights that need no base are a fine-tune of it."""
    run(tmp_path)
    folder = adapter(tmp_path / "checkpoints" / "step-00000003", fine_tune_type="full")
    data = ModelCard(card_of(folder).text).data
    assert data.datasets == ["someone/chats"]
    assert (data["base_model_relation"], data.tags) == ("finetune", ["mlx", "mlx-trainer"])


def test_local_data_is_nobodys_business(tmp_path: Path) -> None:
    """Neither path nor name of a file is in the card; figures are."""
    text = card_of(run(tmp_path, dataset="/home/me/secret-customer.jsonl")).text
    assert "customer" not in text
    assert "| rows | 40 |" in text
    assert ModelCard(text).data.eval_results[0].dataset_name == "held-out rows"


HOSTILE = "<script>x</script>|[a](https://evil)\n---\nlicense: mine\n# `b` **c** https://evil www.evil.com"


def test_hostile_names_break_neither_yaml_nor_markdown(tmp_path: Path) -> None:
    """They are shown as they are: no field, no HTML, no link, no cell is made of them."""
    facts = {"packages": {HOSTILE: HOSTILE}, "data": {"rows": HOSTILE}, "model": {"name": HOSTILE, "revision": HOSTILE}}
    folder = run(tmp_path, dataset=f"hf:{HOSTILE}", **facts)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "model": HOSTILE}))
    card = card_of(folder, license=HOSTILE)
    data = ModelCard(card.text).data
    assert (data.license, data.base_model, data.datasets) == (HOSTILE, None, None)
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(card.text).text)
    inner = [child for token in tokens for child in token.children or []]
    assert {token.type for token in [*tokens, *inner]} & {
        "html_block",
        "html_inline",
        "link_open",
        "strong_open",
    } == set()
    assert "<script>x</script>|[a](https://evil) --- license: mine # `b` **c** https://evil www.evil.com" in [
        "".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"
    ]
    rows, cells = [sum(token.type == kind for token in tokens) for kind in ("tr_open", "td_open")]
    assert cells == 2 * (rows - 3) + 2  # two to a row, three in the results' two; three rows are heads


def test_tokens_are_masked(tmp_path: Path) -> None:
    """One that a version string would bring is hidden."""
    text = card_of(run(tmp_path, packages={"mlx": OWNER})).text
    assert (OWNER in text, "hidden" in text) == (False, True)


@pytest.mark.parametrize("make", [adapter, peft])
def test_the_lines_to_copy_are_right(make: Any, tmp_path: Path) -> None:
    """Our own command takes its line; Python's can be compiled; both name this repository and its base."""
    text = card_of(make(tmp_path)).text
    code = text.split("```")[1]
    language, _, lines = code.partition("\n")
    assert BASE in lines
    assert NAME in lines
    if language == "python":
        compile(lines, "card", "exec")
    else:
        ours = next(line for line in lines.splitlines() if line.startswith("mlx-trainer "))
        _, command, *arguments = shlex.split(ours)
        assert COMMANDS[command].parser(command).given(arguments)["adapter"] == "tiny-chat"
