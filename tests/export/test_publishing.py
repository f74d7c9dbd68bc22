"""The commands that hand over: what they print, and how they end."""

import shutil
from pathlib import Path

import pytest

from mlx_trainer import cli
from tests.export import converter
from tests.export.folders import adapter, run
from tests.tiny import tiny_mistral


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a command that succeeds prints."""
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_a_dry_run_prints_files_sizes_notes_and_the_card(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Everything that would go up, and what would not."""
    folder = run(tmp_path / "run")
    (folder / "optimizer.safetensors").touch()
    out = printed(
        capsys, "push", str(folder), "owner/x", "--dry-run", "--private", "--license", "mit", "--language", "en"
    )
    size = (folder / "adapters.safetensors").stat().st_size
    assert out.startswith("mlx-lm adapter for owner/x (main, private), ")
    assert f"{size:>17,}  adapters.safetensors\nstays here: optimizer.safetensors\n\nREADME.md:\n---\n" in out
    assert "\nlicense: mit\n" in out
    assert "\nlanguage:\n- en\n" in out


def test_the_run_may_lie_elsewhere(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As that of an export; without it the card has no figures."""
    run(tmp_path / "run")
    folder = adapter(tmp_path / "export")
    with_run = printed(capsys, "push", str(folder), "owner/x", "--dry-run", "--run", "run")
    assert ("rows trained on" in with_run, "rows" in printed(capsys, "push", str(folder), "owner/x", "--dry-run")) == (
        True,
        False,
    )


def test_the_other_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A GGUF file, a Modelfile for it, and LM Studio's folder; each prints where it is."""
    tiny_mistral(tmp_path / "merged")
    (tmp_path / "llama.cpp").mkdir()
    shutil.copy(converter.__file__, tmp_path / "llama.cpp" / "convert_hf_to_gguf.py")
    out = printed(capsys, "gguf", "merged", "m.gguf", "--outtype", "bf16", "--llama-cpp", "llama.cpp")
    assert out == "m.gguf: llama, 1 tensors\n"
    assert printed(capsys, "ollama", "m.gguf", "--output", "o") == "o/Modelfile: ollama create NAME -f o/Modelfile\n"
    assert printed(capsys, "lm-studio", "merged", "me/tiny", "--root", "models", "--link") == "models/me/tiny\n"
    assert (tmp_path / "models" / "me" / "tiny" / "config.json").is_symlink()


@pytest.mark.parametrize("command", ["push", "lm-studio"])
def test_a_folder_of_no_kind_ends_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, no traceback."""
    Path("empty").mkdir()
    assert cli.main([command, "empty", "owner/x"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mlx-trainer: empty has no weights of a kind that can be handed over: ")
