"""From a name to a folder: local folders, the offline Hub cache, and names that lead nowhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.source import hub_cache, resolve
from tests.tiny import tiny_mistral

REVISION = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import sys
from mlx_trainer.models import CausalLMModule, ModelError
cache, commit = sys.argv[1:]
for revision in (None, "main", commit):
    module = CausalLMModule("someone/tiny", cache_dir=cache, revision=revision, dtype="float32")
    module.setup("predict")
    print(module.parameter_stats.total, module.tokenizer.bos_token)
try:
    CausalLMModule("someone/other", cache_dir=cache).tokenizer
except ModelError as error:
    print(error)
"""


def test_a_folder_is_itself(tmp_path: Path) -> None:
    """An existing folder is taken as it stands, whatever it is called."""
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path


def test_the_offline_cache_answers(tmp_path: Path) -> None:
    """With the Hub switched off a name is loaded from the cache, by branch or commit; an unknown one is named."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    tiny_mistral(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), REVISION],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ["130368 <s>"] * 3, done.stderr
    assert lines[3] == "The Hub may not be asked for someone/other (HF_HUB_OFFLINE). The cache does not have it either."


def test_a_cache_folder_is_hugging_faces_home_or_the_snapshots_folder(tmp_path: Path) -> None:
    """Snapshots are looked for in `hub` of the given folder, or in the folder itself where they already are."""
    (tmp_path / "direct" / "models--a--b").mkdir(parents=True)
    assert hub_cache(None) is None
    assert hub_cache(tmp_path / "home") == tmp_path / "home" / "hub"
    assert hub_cache(tmp_path / "direct") == tmp_path / "direct"


@pytest.mark.parametrize("name", ["./models/mistral", "/no/such/folder", "a/b/c", "models/"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str) -> None:
    """What can only be a path gets an error about that path, at once."""
    with pytest.raises(ModelError, match=f"There is no folder {name}"):
        resolve(name)


def test_names_files_and_revisions_that_make_no_sense(tmp_path: Path) -> None:
    """A file, a name no repository can have, and a revision of a local folder each get their own sentence."""
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelError, match=r"model\.safetensors is a file; a model is a folder"):
        resolve(file)
    with pytest.raises(ModelError, match=r"'bad name!' is neither an existing folder nor a Hub name \(owner/model\)"):
        resolve("bad name!")
    with pytest.raises(ModelError, match=r"revision 'main' was given, but .* is a local folder"):
        resolve(tmp_path, revision="main")
