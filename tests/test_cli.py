"""The command line: what it takes, what it prints, and how it ends when something is wrong."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_trainer import cli
from mlx_trainer.config import Config, load_config, to_yaml
from mlx_trainer.config.keys import keys
from tests.tiny import tiny_mistral

HEAVY = ("mlx.nn", "mlx_lm", "transformers", "matplotlib", "rich", "ruamel", "cattrs", "mlx_trainer.build")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, on a terminal of 120 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("MLX_TRAINER_TRACEBACK", raising=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that succeeds prints."""
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that the user got wrong prints on stderr; it must end with 2 and print nothing else."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def resolved(capsys: pytest.CaptureFixture[str], *arguments: str) -> Config:
    """Return the configuration that `train --print-config` shows for these arguments."""
    Path("printed.yaml").write_text(printed(capsys, "train", *arguments, "--print-config"))
    return load_config("printed.yaml")


@pytest.mark.parametrize(
    "arguments", [(), ("--help",), ("train", "--help"), ("inspect", "--help"), ("benchmark", "--help")]
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    """Help answers at once, because no model, no data and no configuration library is imported for it."""
    program = (
        "import sys\nfrom mlx_trainer.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert done.stdout.startswith("usage: mlx-trainer ")


def test_the_module_runs_as_a_program() -> None:
    """`python -m mlx_trainer` is the command; its exit code reaches the shell."""
    done = subprocess.run([sys.executable, "-m", "mlx_trainer", "tran"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mlx-trainer: tran is not a command; did you mean train?\n"


def test_pytorch_is_not_loaded_where_it_is_installed(tmp_path: Path) -> None:
    """Not by a command that opens a tokenizer, nor for TensorBoard's files; a user's own import of it still works."""
    pytest.importorskip("torch", reason="PyTorch is not installed (extra interop), so nothing could load it")
    tiny_mistral(tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text('{"prompt": "1+1?", "completion": "2"}\n' * 4)
    command = ["-X", "importtime", "-m", "mlx_trainer", "inspect", "chats.jsonl", "--model", "base"]
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert ("transformers" in loaded, "torch" in loaded) == (True, False)
    code = (
        "import sys\nfrom mlx_trainer.monitoring.event_file import load_tensorboardx as load\nload()\n"
        "print('torch' in sys.modules)\nimport torch\nprint(torch.tensor(1).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n1\n"


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments the program says what it can do, as with --help."""
    overview = printed(capsys)
    assert [line.split()[0] for line in overview.splitlines() if line.startswith("  ")][: len(cli.COMMANDS)] == list(
        cli.COMMANDS
    )
    assert printed(capsys, "--help") == overview


def test_the_help_of_train_names_every_option_with_its_range_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Sections, defaults, ranges and help texts come from the schema."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert [key for key in keys() if f"--{key} " not in text and f"--{key}," not in text] == []
    assert "--lora.rank N Rank of the adapters (a whole number, at least 1; default 16)" in text
    assert "--model.model_name TEXT, --model TEXT Hub name or local folder of the base model" in text


def test_a_data_file_and_a_model_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """No configuration file is needed: the data file is data.dataset_path, and --model and --output are shortcuts."""
    config = resolved(capsys, "chats.jsonl", "--model", "my/model", "--output", "runs/mine", "--resume", "auto")
    actual = (config.data.dataset_path, config.model.model_name, config.run.directory, config.run.resume)
    assert actual == ("chats.jsonl", "my/model", "runs/mine", "auto")


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["a.jsonl"], "a.jsonl"),
        (["a.jsonl", "b.jsonl"], ("a.jsonl", "b.jsonl")),
        (["a.jsonl=0.5"], {"a.jsonl": 0.5}),
        (["a.jsonl=0.5", "b.jsonl", "hf:owner/name=2"], {"a.jsonl": 0.5, "b.jsonl": 1.0, "hf:owner/name": 2.0}),
        (["data/*.jsonl=3"], {"data/*.jsonl": 3.0}),
        (["lr=1e-4.jsonl"], "lr=1e-4.jsonl"),
        (["there=2"], "there=2"),
        (["there=2=0.5"], {"there=2": 0.5}),
        (["=2"], "=2"),
    ],
)
def test_data_files_and_their_weights(words: list[str], path: object, capsys: pytest.CaptureFixture[str]) -> None:
    """One file is text, several are a list, and a number behind `=` is a weight unless a file has that very name."""
    Path("there=2").touch()
    assert resolved(capsys, *words).data.dataset_path == path


def test_mappings_are_pairs_of_words(capsys: pytest.CaptureFixture[str]) -> None:
    """As words, joined by commas, given again, or as YAML for names with commas; all are the same mapping."""
    expected = {"prompt": "data.question", "completion": "answer"}
    for words in (
        ["--data.fields", "prompt=data.question", "completion=answer"],
        ["--data.fields", "prompt=data.question,completion=answer"],
        ["--data.fields=prompt=data.question", "--data.fields", "completion=answer"],
        ["--data.fields", "{prompt: data.question, completion: answer}"],
    ):
        assert resolved(capsys, "a.jsonl", *words, "--data.roles", "bot=assistant").data.fields == expected
    Path("base.yaml").write_text("data: {dataset_path: a.jsonl, fields: {prompt: q}}\n")
    assert resolved(capsys, "base.yaml", "--data.fields", "{}").data.fields == {}
    assert resolved(capsys, "base.yaml", "--data.fields", "text=a=b").data.fields == {"text": "a=b"}


def test_adapters_are_chosen_by_names_patterns_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers in a mapping and in a list are numbers; a word or an expression stays the text that it is."""
    words = ["--lora.rank_pattern", "down_proj=8", r"layers\.1\..*=4", "--lora.alpha_pattern", "down_proj=2.5"]
    lora = resolved(capsys, "a.jsonl", *words, "--lora.layers_to_transform", "0,1").lora
    assert lora.rank_pattern == {"down_proj": 8, r"layers\.1\..*": 4}
    assert (lora.alpha_pattern, lora.layers_to_transform) == ({"down_proj": 2.5}, (0, 1))
    for text in ("all-linear", r".*\.[qv]_proj"):
        assert resolved(capsys, "a.jsonl", "--lora.target_modules", text).lora.target_modules == text


def test_the_command_line_wins_over_files_and_files_over_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    """Defaults < first file < second file < command line, wherever the options stand and however they are written."""
    Path("a.yaml").write_text("data: {dataset_path: a.jsonl, seed: 1}\nlora: {rank: 1, alpha: 1, dropout: 0.1}\n")
    Path("b.json").write_text('{"lora": {"rank": 2, "alpha": 2, "target_modules": ["x"]}}')
    config = resolved(capsys, "a.yaml", "--lora.rank=3", "b.json", "--training.learning_rate", "1e-4", "b.jsonl")
    lora = config.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (3, 2.0, 0.1, ("x",))
    assert (config.training.learning_rate, config.data.dataset_path, config.data.seed) == (1e-4, "b.jsonl", 1)


def test_options_are_read_by_their_types(capsys: pytest.CaptureFixture[str]) -> None:
    """Lists, true and false, null and numbers, as they are written on a command line."""
    config = resolved(
        capsys, "a.jsonl", "--lora.target_modules", "[q_proj, v_proj]", "--data.shuffle", "false",
        "--training.max_grad_norm", "null", "--evaluation.sample_prompts", "Well, who?", "--training.max_steps", "7",
    )  # fmt: skip
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (config.data.shuffle, config.training.max_grad_norm, config.training.max_steps) == (False, None, 7)
    assert config.evaluation.sample_prompts == ("Well, who?",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a.jsonl", "--training.learning_rte", "1"],
            "--training.learning_rte is not an option; did you mean --training.learning_rate?",
        ),
        (["a.jsonl", "--learning_rate=1"], "--learning_rate is not an option; did you mean --training.learning_rate?"),
        (["a.jsonl", "--modle", "x"], "--modle is not an option; did you mean --model?"),
        (["a.jsonl", "--@"], "--@ is not an option; see mlx-trainer train --help"),
        (["a.jsonl", "--lora.rank"], "argument --lora.rank: expected one argument"),
        (["a.jsonl", "--lora.rank", "eight"], "override: lora.rank is 'eight'; it must be a whole number, at least 1"),
        (["a.jsonl", "--lora.rank", "1.5"], "override: lora.rank is '1.5'; it must be a whole number, at least 1"),
        (["a.jsonl", "--data.shuffle", "no"], "override: data.shuffle is 'no'; it must be true or false"),
        (["a.jsonl", "--data.seed", "-1"], "override: data.seed is -1; it must be a whole number, at least 0"),
        (
            ["a.jsonl", "a.jsonl=2"],
            "a.jsonl is given twice; give it once, with the weight that is meant, such as a.jsonl=2",
        ),
        (
            ["a.jsonl=0"],
            "override: data.dataset_path is {'a.jsonl': 0.0}; it must be text, a list of text or a mapping of text to "
            "numbers, not empty, weights above 0",
        ),
        (
            ["--data.fields", "prompt=q", "a.jsonl"],
            "--data.fields: 'a.jsonl' is no pair such as a=b; files stand before this option",
        ),
        (
            ["a.jsonl", "--data.fields", "prompt=q", "prompt=r"],
            "--data.fields: 'prompt' is given twice, as 'q' and 'r'; give it once",
        ),
        (
            ["a.jsonl", "--data.roles", "bot="],
            "override: data.roles is {'bot': ''}; it must be a mapping of text to text, none of it empty",
        ),
        (["none.yaml"], "none.yaml: there is no such file"),
        (
            [],
            "configuration: data.dataset_path is required: JSONL file, folder of train.jsonl and valid.jsonl, pattern "
            "or hf:owner/name; or several, also with weights",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "inspect", "benchmark", "validate-config"])
def test_a_wrong_argument_is_one_paragraph_and_code_2(
    command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The message says what is wrong and what would be right; there is no traceback, and nothing is written."""
    expected = message.replace("mlx-trainer train", f"mlx-trainer {command}")
    assert refused(capsys, command, *arguments) == f"mlx-trainer: {expected}\n"
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_a_file_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each problem, each with its file and key."""
    Path("recipe.yaml").write_text("training: {learning_rte: 1}\nlora: {rank: lots}\ndata: {dataset_path: a.jsonl}\n")
    assert refused(capsys, "validate-config", "recipe.yaml") == (
        "mlx-trainer: recipe.yaml: lora.rank is 'lots'; it must be a whole number, at least 1\n"
        "recipe.yaml: training.learning_rte is not a known key; did you mean learning_rate?\n"
    )


def test_a_valid_configuration_is_told_with_its_unwise_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Warnings do not make a configuration invalid."""
    assert printed(capsys, "validate-config", "a.jsonl", "--lora.dropout", "0.5") == (
        "warning: lora.dropout 0.5 drops most of what an adapter could learn from; 0 to 0.1 is usual\n"
        "The configuration is valid.\n"
    )


def test_what_is_printed_is_the_configuration_that_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    """--print-config prints the text that the run folder gets as config.yaml, and trains nothing."""
    Path("a.yaml").write_text("data: {dataset_path: a.jsonl}\n")
    expected = to_yaml(load_config("a.yaml", overrides={"lora.rank": 4}))
    assert printed(capsys, "train", "a.yaml", "--lora.rank", "4", "--print-config") == expected


def failing(error: BaseException) -> SimpleNamespace:
    """Return a stand-in for the command `train` that fails with `error`."""

    def parser(name: str) -> SimpleNamespace:
        return SimpleNamespace(given=lambda arguments: {})

    def run(given: object) -> int:
        raise error

    return SimpleNamespace(run=run, parser=parser)


def test_each_kind_of_error_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 for what the user gave, 1 for a training that failed, 130 for Ctrl-C; the text alone is printed."""
    from mlx_trainer.checkpoint import CheckpointError
    from mlx_trainer.data import DataError
    from mlx_trainer.models import ModelError
    from mlx_trainer.monitoring import MonitoringError
    from mlx_trainer.trainer import TrainingError

    for error, code, text in (
        (DataError("rows.jsonl:3: broken"), 2, "rows.jsonl:3: broken"),
        (ModelError("no weights"), 2, "no weights"),
        (CheckpointError("no checkpoint"), 2, "no checkpoint"),
        (MonitoringError("no folder"), 2, "no folder"),
        (PermissionError(13, "Permission denied", "/runs"), 2, "/runs: Permission denied"),
        (TrainingError("the loss stays nan"), 1, "the loss stays nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        monkeypatch.setitem(cli.COMMANDS, "train", failing(error))
        assert cli.main(["train"]) == code
        assert capsys.readouterr().err == f"mlx-trainer: {text}\n"


def test_developers_see_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """--traceback and MLX_TRAINER_TRACEBACK=1 let an error through."""
    monkeypatch.setitem(cli.COMMANDS, "train", failing(PermissionError(13, "Permission denied", "/runs")))
    with pytest.raises(PermissionError):
        cli.main(["train", "--traceback"])
    monkeypatch.setenv("MLX_TRAINER_TRACEBACK", "1")
    with pytest.raises(PermissionError):
        cli.main(["train"])


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of the program itself is not dressed up as one of the user's."""
    monkeypatch.setitem(cli.COMMANDS, "train", failing(AttributeError("ours")))
    with pytest.raises(AttributeError, match="ours"):
        cli.main(["train"])
