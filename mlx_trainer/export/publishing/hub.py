"""To the Hub: an adapter, a PEFT export or a merged model, with its card, and nothing else of the folder.

Nothing on the Hub is ever deleted. What goes up is laid out in a folder of its own first, so a dry run shows exactly
that. huggingface_hub's own retries and resuming apply: what is there already is not sent again.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from mlx_trainer.export.publishing.card import Card, hub_base, is_hub_name, is_repository, model_card
from mlx_trainer.export.publishing.contents import KINDS, Contents, contents_of
from mlx_trainer.export.publishing.run import Run, run_of
from mlx_trainer.models import ModelError
from mlx_trainer.models.hub_errors import LOGIN, explained, hub_errors
from mlx_trainer.monitoring import visible

CARD = "README.md"


@frozen
class Upload:
    """What goes up, or has gone: where to, each file's bytes, the card, and what stays here; `url` of the commit."""

    repo_id: str
    revision: str
    private: bool | None
    kind: str
    files: Mapping[str, int]
    card: str
    left_out: Sequence[str]
    notes: Sequence[str]
    url: str | None = None

    def as_text(self) -> str:
        """Return it as people read it, the card at the end."""
        visibility = {True: ", private", False: ", public", None: ""}[self.private]
        lines = [f"{self.kind} for {self.repo_id} ({self.revision}{visibility}), {sum(self.files.values()):,} bytes:"]
        lines += [f"  {size:>15,}  {name}" for name, size in self.files.items()]
        lines += [f"stays here: {', '.join(map(visible, self.left_out))}"] if self.left_out else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", f"{CARD}:", visible(self.card)])


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: Sequence[str] | None = None,
    run: str | os.PathLike[str] | None = None,
) -> Upload:
    """Upload what `folder` holds (an mlx-lm adapter, a PEFT export, a merged model) to the Hub's `repo_id`.

    The repository is made where it is missing, public unless `private`; so is the branch `revision`. A README.md in
    the folder is the card, else one is made of what the run's folder tells, which is `run`, or one that `folder` lies
    in. `dry_run` asks nobody. What is on the
    Hub afterwards is compared with what was sent. Raises ModelError, before anything is sent, where the folder is not
    whole, where a name is a path of this machine, where no token is there, or where the repository holds other
    weights; and for every answer of the Hub that is none.
    """
    if not is_repository(repo_id):
        raise ModelError(f"{repo_id!r} is no name of a repository; give OWNER/NAME.")
    if base_model is not None and not is_hub_name(base_model):
        raise ModelError(f"The base model {base_model!r} is no name on the Hub; give OWNER/NAME.")
    contents = contents_of(Path(folder))
    told = run_of(contents.folder if run is None else Path(run))
    base = hub_base(contents, told, base_model)
    if license is None and base is not None and not dry_run:
        license = license_of(base, token)
    card = card_of(contents, repo_id, told, base=base, license=license, language=language)
    with staged(contents, base, card) as stage:
        upload = Upload(
            repo_id,
            revision or "main",
            private,
            contents.kind.name,
            {path.name: path.stat().st_size for path in sorted(stage.iterdir())},
            card.text,
            contents.left_out,
            card.notes,
        )
        if dry_run:
            return upload
        try:
            return evolve(upload, url=send(upload, stage, token, message))
        except hub_errors() as error:
            raise ModelError(explained(error, repo_id, revision)) from error


def license_of(base: str, token: str | None) -> str | None:
    """Return the license that the base's card on the Hub names, None where it names none or cannot be had."""
    from huggingface_hub import HfApi

    try:
        data = HfApi(token=token).model_info(base).card_data
    except hub_errors():
        return None
    return None if data is None else data.get("license")


def card_of(contents: Contents, repo_id: str, run: Run, **known: Any) -> Card:
    """Return the card that lies in the folder, else one that is made of the run; `known` is as for `model_card`."""
    if CARD in contents.files:
        return Card(own_card(contents.folder / CARD, **known), [])
    return model_card(contents, repo_id, run, **known)


@contextmanager
def staged(contents: Contents, base: str | None, card: Card) -> Iterator[Path]:
    """Yield a folder with what goes up, made of links; that settings had to be changed becomes a note of the card."""
    with tempfile.TemporaryDirectory(prefix="mlx-trainer-") as name:
        stage = Path(name)
        for file in contents.files:
            (stage / file).symlink_to((contents.folder / file).resolve())
        replace(stage / CARD, card.text)
        settings = travelling(contents.settings, contents.kind.base_key, base)
        if settings != contents.settings:
            replace(stage / contents.kind.settings, json.dumps(settings, indent=2) + "\n")
            card.notes.append(f"{contents.kind.settings} goes without the paths of this machine")
        yield stage


def replace(link: Path, text: str) -> None:
    """Put a file where a link is, or nothing; what the link leads to stays as it is."""
    link.unlink(missing_ok=True)
    link.write_text(text, encoding="utf-8")


def own_card(path: Path, base: str | None, license: str | None, language: Sequence[str] | None) -> str:
    """Return the card that lies in the folder, with what was given laid over its metadata; raises ModelError."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # YAML's own errors, and whatever its values lead to
        raise ModelError(f"{path} has no metadata that can be read: {error!s:.200}") from error
    given = {"license": license, "language": list(language) if language else None}
    for key, value in given.items():
        if value is not None:
            card.data[key] = value
    named = card.data.get("base_model")
    names = [named] if isinstance(named, str) else named or []
    if not all(isinstance(name, str) and is_hub_name(name) for name in names):
        if base is None:
            raise ModelError(f"{path} names {named!r} as base_model, no name on the Hub; give --base-model OWNER/NAME.")
        card.data["base_model"] = base
    return str(card)


def travelling(settings: Mapping[str, Any], base_key: str, base: str | None) -> dict[str, Any]:
    """Return settings as others can have them: the base by its name on the Hub, no absolute path of this machine."""
    kept = {key: value for key, value in settings.items() if not (isinstance(value, str) and os.path.isabs(value))}
    named = settings.get(base_key)
    if isinstance(named, str) and not is_hub_name(named):
        kept.pop(base_key, None)
        if base is not None:
            kept[base_key] = base
    return {key: kept[key] for key in [*settings, base_key] if key in kept}


def send(upload: Upload, stage: Path, token: str | None, message: str | None) -> str:
    """Make repository and branch where missing, upload, compare, and return the commit's address.

    Raises ModelError, and what huggingface_hub raises.
    """
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if token is None:
        raise ModelError(f"Uploading to {upload.repo_id} needs an access token that may write: {LOGIN}.")
    api = HfApi(token=token)
    api.create_repo(upload.repo_id, private=upload.private, exist_ok=True)
    check_visibility(api, upload)
    if upload.revision != "main":
        api.create_branch(upload.repo_id, branch=upload.revision, exist_ok=True)
    refuse_other_weights(api, upload)
    url = uploaded(api, upload, stage, message or f"Upload {upload.kind} with mlx-trainer")
    compare(api, upload, stage)
    return url


def uploaded(api: Any, upload: Upload, stage: Path, message: str) -> str:
    """Upload the folder and return the commit's address; raises ModelError for what the client finds wrong itself."""
    try:
        commit = api.upload_folder(
            repo_id=upload.repo_id, folder_path=stage, revision=upload.revision, commit_message=message
        )
    except (RuntimeError, ValueError) as error:
        # One file's failure comes as a RuntimeError around its reason; a refused card as a ValueError that tells all.
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, hub_errors()):
            raise error.__cause__ from error
        raise ModelError(f"{upload.repo_id}: {' '.join(str(error).split())}") from error
    return str(commit.commit_url)


def check_visibility(api: Any, upload: Upload) -> None:
    """Raise ModelError where a repository that is to be private is public: making it would not have changed it."""
    if upload.private and not api.model_info(upload.repo_id).private:
        raise ModelError(f"{upload.repo_id} is there already, and public; make it private on its Hub page first.")


def refuse_other_weights(api: Any, upload: Upload) -> None:
    """Raise ModelError where weights on the Hub would stay beside those that go up.

    Old shards would be loaded with the new ones, and an adapter of another layout would lose its adapter_config.json.
    """
    weights = [kind.weights for kind in KINDS]
    listed = api.list_repo_files(upload.repo_id, revision=upload.revision)
    if other := sorted(
        name for name in listed if name not in upload.files and any(fnmatch(name, part) for part in weights)
    ):
        raise ModelError(
            f"{upload.repo_id} ({upload.revision}) holds other weights, {', '.join(other[:3])}, which would stay "
            "beside these; push to another repository or --revision, or delete them on the Hub."
        )


def compare(api: Any, upload: Upload, stage: Path) -> None:
    """Raise ModelError where a file on the Hub is not what was sent, by the digests that the Hub lists."""
    found = api.verify_repo_checksums(upload.repo_id, revision=upload.revision, local_dir=stage)
    if wrong := [*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths]:
        raise ModelError(f"{upload.repo_id} holds something else than was sent for {', '.join(wrong[:5])}; push again.")
