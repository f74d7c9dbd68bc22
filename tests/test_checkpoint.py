"""The store: a checkpoint is complete or absent, and a damaged one is never taken for good."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_trainer.checkpoint import MANIFEST, CheckpointError, CheckpointStore, verify


def content(text: str) -> Callable[[Path], None]:
    """Writes two files, one of them in a folder."""

    def write(directory: Path) -> None:
        (directory / "weights.bin").write_text(text)
        (directory / "more").mkdir()
        (directory / "more" / "state.json").write_text(json.dumps({"text": text}))

    return write


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_verifies_and_names_every_file(tmp_path: Path) -> None:
    """Sizes and SHA-256 of all files stand in the manifest, and nothing else is left in the folder."""
    path = CheckpointStore(tmp_path).save(7, content("seven"))

    verify(path)
    assert path == tmp_path / "step-00000007"
    assert set(json.loads((path / MANIFEST).read_text())["files"]) == {"weights.bin", "more/state.json"}
    assert names(tmp_path) == ["step-00000007"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("no")])
def test_a_save_that_fails_leaves_the_older_ones_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    """A full disk becomes a CheckpointError naming the checkpoint; any other error is passed on."""
    store = CheckpointStore(tmp_path, keep_last=1)
    old = store.save(1, content("one"))

    def fails(directory: Path) -> None:
        content("half")(directory)
        raise error

    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as raised:
        store.save(2, fails)

    if isinstance(error, OSError):
        assert str(raised.value).startswith(f"could not write {tmp_path}/step-00000002: {error} (")
    verify(old)
    assert names(tmp_path) == ["step-00000001"]


def test_the_newest_are_kept_and_the_protected_one(tmp_path: Path) -> None:
    """By step and not by name or time: step 9 is older than step 10, and the best one stays."""
    store = CheckpointStore(tmp_path, keep_last=2)
    best = store.save(9, content("best"))
    for step in (10, 11, 100_000_000):
        store.save(step, content(str(step)), protect=best)

    assert [path.name for path in store.list()] == ["step-00000009", "step-00000011", "step-100000000"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """As after a resume from an older checkpoint."""
    store = CheckpointStore(tmp_path)
    store.save(3, content("first"))
    path = store.save(3, content("second"))

    verify(path)
    assert (path / "weights.bin").read_text() == "second"
    assert names(tmp_path) == ["step-00000003"]


def truncate(path: Path) -> None:
    (path / "weights.bin").write_text("t")


def flip(path: Path) -> None:
    (path / "weights.bin").write_text("twO")


def remove(path: Path) -> None:
    (path / "more" / "state.json").unlink()


def link(path: Path) -> None:
    (path / "weights.bin").unlink()
    (path / "weights.bin").symlink_to("/dev/null")


def no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def no_json(path: Path) -> None:
    (path / MANIFEST).write_text("{")


def newer_format(path: Path) -> None:
    (path / MANIFEST).write_text(json.dumps({"format_version": 2, "files": {}}))


def escapes(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../step-00000001/weights.bin"] = manifest["files"].pop("weights.bin")
    (path / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = [
    (truncate, "weights.bin has 1 bytes, its manifest says 3"),
    (flip, "weights.bin differs from what was saved (SHA-256)"),
    (remove, "'more/state.json' is missing"),
    (link, "weights.bin cannot be read as a plain file: Too many levels of symbolic links"),
    (no_manifest, "is no complete checkpoint: "),
    (no_json, "is no complete checkpoint: manifest.json cannot be used (Expecting"),
    (newer_format, "has format version 2; this version of mlx_trainer reads 1"),
    (escapes, "is no complete checkpoint: manifest.json cannot be used (it is not as it was written)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], message: str
) -> None:
    """The newest good one is used; where none is left, starting over is refused."""
    store = CheckpointStore(tmp_path)
    good, newer = store.save(1, content("one")), store.save(2, content("two"))
    damage(newer)

    assert store.latest() == good
    assert re.search(f"passing over a damaged checkpoint: .*{re.escape(message)}", caplog.text)

    (good / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged; move them away to start over"):
        store.latest()


def test_without_checkpoints_there_is_no_latest(tmp_path: Path) -> None:
    """Also where the folder does not exist yet."""
    assert CheckpointStore(tmp_path / "none").latest() is None


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where the folder should be, as in a mistyped path."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=re.escape(f"could not write {tmp_path}/file/step-00000001")):
        CheckpointStore(tmp_path / "file").save(1, content("one"))
