"""The recipes, run small: what they promise is in their folders, and the losses fall."""

import ast
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer.config import load_config, unwise
from mlx_trainer.monitoring import read_json_lines
from tests.tiny import tiny_mistral

RECIPES = Path(__file__).parents[1] / "recipes"
RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "samples.jsonl",
    "report.html",
    "logs/train.jsonl",
    "adapter/adapters.safetensors",
    "adapter/adapter_config.json",
)


def recipe(name: str) -> ModuleType:
    """The module of a recipe, imported as Python does for a script: with its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        return importlib.import_module(name)


def code_lines(name: str) -> int:
    """How many lines of a recipe hold code: neither empty, nor docstring or comment alone."""
    source = (RECIPES / name).read_text(encoding="utf-8")
    texts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and is_text(node.value)]
    prose = {line for node in texts for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in prose]
    return sum(1 for line in lines if line and not line.startswith("#"))


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a bare string, as docstrings are."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The folder of a small quick start, its cache, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    run, cache = folder / "run", folder / "cache"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        recipe("quickstart").main(["--small", "--output", str(run), "--cache", str(cache)])
    return run, cache, "\n".join(printed)


def test_quickstart_leaves_a_complete_run_folder(quickstart: tuple[Path, Path, str]) -> None:
    """Every file that the design names is there and has content, with at least one checkpoint and TensorBoard file."""
    run, _, _ = quickstart
    assert [name for name in RUN_FILES if not (run / name).is_file() or not (run / name).stat().st_size] == []
    assert len(list(run.glob("checkpoints/step-*/manifest.json"))) == 2
    assert len(list(run.glob("tensorboard/events*"))) == 1


def test_quickstart_learns(quickstart: tuple[Path, Path, str]) -> None:
    """The held-out loss falls from the first evaluation to each later one, and what is printed are these figures."""
    run, _, printed = quickstart
    losses = [line["val/loss"] for line in read_json_lines(run / "metrics.jsonl") if "val/loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3
    assert f"{losses[0]:8.2f}{losses[-1]:8.2f}" in printed


def test_quickstart_shows_answers_before_and_after(quickstart: tuple[Path, Path, str]) -> None:
    """Three held-out questions are answered by the base and by the tuned model, beside the docstring."""
    run, _, printed = quickstart
    samples = read_json_lines(run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0, 0, 5, 5, 5, 8, 8, 8]
    assert all(sample["prompt"] in printed and sample["reference"] in printed for sample in samples)


def test_quickstart_holds_names_out_of_both_trainings(quickstart: tuple[Path, Path, str]) -> None:
    """No held-out name is asked about in the tuning, and no held-out docstring stands in the base's text."""
    run, _, _ = quickstart
    docstrings = recipe("docstrings")
    entries = docstrings.read_library(150)
    pages = "\n".join(entry.page() for entry in entries if not entry.held_out)
    held_out = [entry for entry in entries if entry.held_out and entry.public]
    asked = [row["messages"][0]["content"] for row in read_json_lines(run / "data" / "held_out.jsonl")]
    learned = (run / "data" / "chats.jsonl").read_text(encoding="utf-8")
    assert set(asked) <= {entry.question for entry in held_out}
    assert [entry.call for entry in held_out if f".{entry.name}`" in pages or f".{entry.name}(" in pages] == []
    assert [entry.call for entry in held_out if entry.question in learned or f"\n{entry.summary}\n" in pages] == []


def test_quickstart_writes_the_configuration_it_ran_with(quickstart: tuple[Path, Path, str]) -> None:
    """`config.yaml` loads, and names this run's data, base and length."""
    run, cache, _ = quickstart
    config = load_config(run / "config.yaml")
    assert Path(config.data.train_paths[0]) == run / "data" / "chats.jsonl"
    assert Path(config.model.model_name).parent == cache
    assert config.training.max_steps == 10


def test_a_second_quickstart_takes_the_base_from_the_cache(
    quickstart: tuple[Path, Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The base of the first run is used as it is, and this is said."""
    _, cache, _ = quickstart
    module = recipe("quickstart")
    [base] = cache.iterdir()
    written = (base / "model.safetensors").stat().st_mtime_ns
    assert module.cached_base(cache, ["no page is read"], module.SMALL.base) == base
    assert (base / "model.safetensors").stat().st_mtime_ns == written
    assert "taken from an earlier run" in capsys.readouterr().out


def test_a_second_quickstart_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Folders that exist are passed over, whatever is in them."""
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    unused = recipe("quickstart").unused
    assert unused(tmp_path / "run") == tmp_path / "run-3"
    assert unused(tmp_path / "new") == tmp_path / "new"


def test_the_base_is_a_mistral_in_hugging_face_layout(quickstart: tuple[Path, Path, str]) -> None:
    """mlx-lm opens it, its control tokens have Mistral v0.3's ids, and its template writes Mistral's format."""
    from mlx_lm import load

    _, cache, _ = quickstart
    [base] = cache.iterdir()
    model, tokenizer, *_ = load(str(base))
    config = json.loads((base / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"]) == ("mistral", True)
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    assert dict(tree_flatten(model.parameters())).keys() == weights.keys()
    tokens = recipe("small_base").CONTROL_TOKENS
    assert tokenizer.convert_tokens_to_ids(list(tokens)) == list(range(10))
    messages = [{"role": role, "content": f"{role}'s"} for role in ("user", "assistant", "user")]
    render: Any = tokenizer.apply_chat_template
    rendered = render(messages, tokenize=False)
    assert rendered == "<s>[INST] user's[/INST] assistant's</s>[INST] user's[/INST]"


def test_docstrings_become_pages_and_chats() -> None:
    """A definition gives its call, kind, home and arguments; the summary is the first sentence; nested are methods."""
    docstrings = recipe("docstrings")
    source = '''
class Box:
    """A box. With a lid."""

    def open(self, width, *, slowly=False):
        """Open the lid
        of this box: at once.

        More.
        """

def close(): "Close all boxes."
def undocumented(): pass
'''
    box, opened, closed = docstrings.definitions(ast.parse(source), "boxes")
    assert [e.call for e in (box, opened, closed)] == ["boxes.Box", "boxes.Box.open(width, slowly)", "boxes.close()"]
    assert box.answer == "A class from `boxes`. In short: A box."
    expected = "A method from `boxes` with two arguments. In short: Open the lid of this box."
    assert opened.chat()["messages"] == [
        {"role": "user", "content": "What does `boxes.Box.open(width, slowly)` do?"},
        {"role": "assistant", "content": expected},
    ]
    assert closed.page() == "`boxes.close()`\nfunction from `boxes`\n\nClose all boxes."


def test_mistral_lora_trains_an_adapter_on_your_chats(tmp_path: Path) -> None:
    """With a local model the recipe takes 3 epochs of windows of four batches; checkpoint, curves and adapter stay."""
    model = tiny_mistral(tmp_path / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} " * n}]}
        for n in range(1, 21)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    recipe("mistral_lora").main(str(tmp_path / "chats.jsonl"), str(model), str(run))
    [checkpoint] = run.glob("checkpoints/step-*")
    state = json.loads((checkpoint / "state.json").read_text())
    assert checkpoint.name == f"step-{3 * 3:08d}"  # 18 rows are 9 batches: windows of 4, 4 and 1
    assert state["epoch"] == 3
    assert (run / "adapter" / "adapters.safetensors").is_file()
    assert len(list(run.glob("tensorboard/events*"))) == 1


def test_preference_trains_an_adapter_on_your_pairs(tmp_path: Path) -> None:
    """With a local model the recipe takes an epoch of windows of eight batches; its YAML twin says the same."""
    model = tiny_mistral(tmp_path / "model")
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n} " * n, "rejected": "No. " * (n % 3 + 1)} for n in range(1, 21)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    recipe("preference").main(str(tmp_path / "prefs.jsonl"), str(model), str(run))
    assert [path.name for path in run.glob("checkpoints/step-*")] == [
        "step-00000002"
    ]  # 18 pairs are 9 batches: 8 and 1
    assert (run / "adapter" / "adapters.safetensors").is_file()
    twin = load_config(RECIPES / "preference.yaml")
    training = twin.training
    assert (training.learning_rate, training.num_epochs, training.gradient_accumulation_steps) == (2e-5, 1, 8)
    assert (training.method, twin.preference.beta, unwise(twin)) == ("dpo", 0.1, ())


def test_regression_learns_the_curve() -> None:
    """The mean squared error on points between the trained ones falls below a hundredth of the curve's own 0.54."""
    evaluation = recipe("regression").main().evaluation
    assert evaluation.loss < 0.0054


@pytest.mark.parametrize(("name", "most"), [("mistral_lora.py", 30), ("preference.py", 30), ("regression.py", 25)])
def test_recipes_are_short(name: str, most: int) -> None:
    """The real recipes have 30 lines of code or fewer, the one without a language model 25."""
    assert code_lines(name) <= most
