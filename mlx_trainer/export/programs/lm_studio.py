"""To LM Studio: a merged model in the folder where it looks, `models/<publisher>/<model>`."""

import os
import shutil
from pathlib import Path

from mlx_trainer.export.output import complete_folder
from mlx_trainer.export.publishing.card import is_repository
from mlx_trainer.export.publishing.contents import MODEL, contents_of
from mlx_trainer.models import ModelError

ROOT = "~/.lmstudio/models"


def lm_studio(
    folder: str | os.PathLike[str], name: str, *, root: str | os.PathLike[str] = ROOT, link: bool = False
) -> Path:
    """Copy a merged model to `root`/`name`, where `name` is PUBLISHER/MODEL, and return that folder.

    Its MLX engine reads float and quantized models alike. `link` makes links to the files instead, which saves the
    room and breaks where they go. The folder appears only when it is whole. Raises ModelError where `folder` is no
    merged model, and where there is something of that name already.
    """
    contents = contents_of(Path(folder))
    if contents.kind is not MODEL:
        raise ModelError(f"{folder} holds an adapter; LM Studio takes whole models: merge it first.")
    if not is_repository(name):
        raise ModelError(f"{name!r} is no name for LM Studio; give PUBLISHER/MODEL.")
    target = Path(root).expanduser() / name
    if target.exists() or target.is_symlink():
        raise ModelError(f"{target} is there already; name another model, or remove it.")
    with complete_folder(target) as made:
        for file in contents.files:
            source = (contents.folder / file).resolve()
            (made / file).symlink_to(source) if link else shutil.copy2(source, made / file)
    return target
