"""`mlx-trainer merge` and `combine`: what they print, their options, and their exit codes."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.cli import main
from mlx_trainer.commands import COMMANDS
from mlx_trainer.export import combine, merge, read_adapter
from mlx_trainer.export.merging.combine import METHODS
from tests.export.random_adapters import random_adapter, tensors_of
from tests.tiny import tiny_mistral


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a base, a packed base and an adapter for each."""
    monkeypatch.chdir(tmp_path)
    random_adapter(tiny_mistral(tmp_path / "base"), tmp_path / "adapter")
    random_adapter(tiny_mistral(tmp_path / "packed", bits=4), tmp_path / "other")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of a command and all that it printed."""
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_merge_prints_one_line_and_unmerge_checks_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual way: merge, then check; a wrong weight gives code 1."""
    code, text = run(capsys, "merge", "adapter", "merged")
    assert code == 0
    assert text.startswith("merged: 4 weights merged into float32, for mlx-lm and transformers; ")
    code, text = run(capsys, "merge", "--unmerge", "merged", "adapter")
    assert (code, text.count("\n")) == (0, 1)
    assert text.startswith("Merged minus adapter equals the base in all ")
    tensors = tensors_of(folder / "merged")
    tensors["lm_head.weight"][3, 3] += 1
    mx.save_safetensors("merged/model.safetensors", tensors)
    code, text = run(capsys, "merge", "--unmerge", "merged", "adapter")
    assert (code, text) == (1, "Merged minus adapter is not the base in 1 of 21 weights: lm_head.weight.\n")


def test_the_options_of_merge_reach_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--dtype, --requantize, --bits, --max-loss, --model and --data each change what happens."""
    assert "into float16, for" in run(capsys, "merge", "adapter", "half", "--dtype", "float16")[1]
    assert {value.dtype for value in tensors_of(folder / "half").values()} == {mx.float16}
    assert "into 3 bits, for mlx-lm;" in run(capsys, "merge", "other", "three", "--requantize", "--bits", "3")[1]
    code, text = run(capsys, "merge", "other", "none", "--requantize", "--max-loss", "0.01")
    assert (code, (folder / "none").exists()) == (2, False)
    assert text.startswith("mlx-trainer: Merged into 4 bits, ")
    tiny_mistral(folder / "twin", seed=5)
    assert run(capsys, "merge", "adapter", "from-twin", "--model", "twin")[0] == 0
    name = "model.norm.weight"
    assert np.array_equal(tensors_of(folder / "from-twin")[name], tensors_of(folder / "twin")[name])


def test_the_effect_can_be_measured_on_own_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of --data are encoded as in training; another text gives another figure, one without rows an error."""
    chat = {"messages": [{"role": "user", "content": "one or two?"}, {"role": "assistant", "content": "two"}]}
    Path("rows.jsonl").write_text(json.dumps(chat) + "\n")
    default = run(capsys, "merge", "other", "a", "--requantize")[1].partition("; ")[2]
    own = run(capsys, "merge", "other", "b", "--requantize", "--data", "rows.jsonl")[1].partition("; ")[2]
    assert " of the adapter's effect is lost." in own
    assert own != default
    code, text = run(capsys, "merge", "other", "c", "--data", "missing.jsonl")
    assert (code, "missing.jsonl" in text) == (2, True)


def test_combine_takes_weights_and_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`one=0.7 two=-0.3 both`: the same as the library's call; a lone folder is no combination."""
    assert COMMANDS["combine"].options["--method"]["choices"] == METHODS
    random_adapter(folder / "base", folder / "two", seed=9)
    code, text = run(capsys, "combine", "adapter=0.7", "two=-0.3", "both", "--method", "svd", "--rank", "3")
    assert code == 0
    assert text.startswith("both: an adapter of rank 3 on 4 layers, ")
    expected = combine([folder / "adapter", folder / "two"], folder / "same", [0.7, -0.3], "svd", rank=3)
    for path, update in read_adapter(expected.directory).layers.items():
        assert mx.array_equal(update.a, read_adapter(folder / "both").layers[path].a).item()
    assert run(capsys, "combine", "adapter", "two", "sum")[1] == "sum: an adapter of rank 8 on 4 layers, exact.\n"
    assert run(capsys, "combine", "adapter", "two", "t", "--method", "ties", "--density", "0.2")[0] == 0
    assert run(capsys, "combine", "adapter", "two", "d", "--method", "dare", "--seed", "3")[0] == 0
    code, text = run(capsys, "combine", "adapter")
    assert (code, text.startswith("mlx-trainer: combine takes adapters and then the new folder")) == (2, True)


@pytest.mark.parametrize("option", [["--bits", "4"], ["--dtype", "float16"], ["--data", "x"], ["--requantize"]])
def test_unmerge_takes_no_options_of_merging(
    folder: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    """An option that would do nothing is refused by name."""
    code, text = run(capsys, "merge", "--unmerge", "merged", "adapter", *option)
    assert (code, text.startswith(f"mlx-trainer: {option[0]} is for merging")) == (2, True)


def test_code_of_a_base_is_copied_only_where_it_is_trusted(folder: Path) -> None:
    """config.json that names Python files is refused, and with trust they go along."""
    settings = json.loads(Path("base/config.json").read_text()) | {"auto_map": {"AutoConfig": "own.Config"}}
    Path("base/config.json").write_text(json.dumps(settings))
    Path("base/own.py").write_text("# code\n")
    assert main(["merge", "adapter", "refused"]) == 2
    assert not Path("refused").exists()
    assert main(["merge", "adapter", "merged", "--trust-remote-code"]) == 0
    assert Path("merged/own.py").read_text() == "# code\n"
    assert merge(folder / "adapter", folder / "again", trust_remote_code=True).lost < 1e-4


def test_a_base_of_the_hub_is_taken_from_the_cache_at_its_revision(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--revision and --cache-dir lead to a snapshot; a local folder has no revisions."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    tiny_mistral(folder / "hub" / "models--someone--tiny" / "snapshots" / commit, seed=7)
    where = ["--model", "someone/tiny", "--cache-dir", str(folder), "--revision", commit]
    assert run(capsys, "merge", "adapter", "merged", *where)[0] == 0
    assert run(capsys, "merge", "--unmerge", "merged", "adapter", *where)[0] == 0
    assert run(capsys, "merge", "--unmerge", "merged", "adapter")[0] == 1  # the adapter's own base is another one
    code, text = run(capsys, "merge", "adapter", "other", "--revision", commit)
    assert (code, "which has no revisions" in text) == (2, True)
