"""LM Studio's folder: what is copied or linked, and that nothing is overwritten."""

from pathlib import Path

import pytest

from mlx_trainer.export.programs.lm_studio import lm_studio
from mlx_trainer.models import ModelError
from mlx_trainer.models.loading import tensor_names
from tests.export.folders import adapter
from tests.hub_files import read
from tests.tiny import tiny_mistral


@pytest.mark.parametrize("link", [False, True])
def test_a_model_is_where_lm_studio_looks(link: bool, tmp_path: Path) -> None:
    """Every file of the model and nothing else, as copies or links, below publisher and model."""
    folder = tiny_mistral(tmp_path / "merged", bits=4)
    model = read(folder)
    (folder / ".env").write_text("secret")
    target = lm_studio(folder, "me/tiny-chat", root=tmp_path / "models", link=link)
    assert target == tmp_path / "models" / "me" / "tiny-chat"
    assert read(target) == model
    assert {path.is_symlink() for path in target.iterdir()} == {link}
    assert [path.name for path in target.parent.iterdir()] == ["tiny-chat"]
    assert tensor_names(target) == tensor_names(folder)


def test_nothing_is_overwritten_and_adapters_are_refused(tmp_path: Path) -> None:
    """What is there stays; a name may not lead elsewhere."""
    folder, root = tiny_mistral(tmp_path / "merged"), tmp_path / "models"
    (root / "me" / "mine").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"me/mine is there already; name another model, or remove it"):
        lm_studio(folder, "me/mine", root=root)
    for name in ("../mine", "me/../..", "mine", "/etc/x"):
        with pytest.raises(ModelError, match="is no name for LM Studio; give PUBLISHER/MODEL"):
            lm_studio(folder, name, root=root)
    with pytest.raises(ModelError, match=r"holds an adapter; LM Studio takes whole models: merge it first"):
        lm_studio(adapter(tmp_path / "adapter"), "me/other", root=root)
    assert [path.name for path in root.rglob("*")] == ["me", "mine"]
