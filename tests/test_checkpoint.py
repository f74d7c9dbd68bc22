"""The store: a checkpoint is complete or absent, and a damaged one is never taken for good."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_trainer.checkpoint import MANIFEST, CheckpointError, CheckpointStore, verify
from mlx_trainer.checkpoint.manifest import LARGEST, as_text, digest, run_of

ROOT = str(Path(__file__).parent.parent)


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


def forge(path: Path, **changes: Any) -> None:
    """A manifest as whoever can write here would make it: with a digest that fits."""
    contents = json.loads((path / MANIFEST).read_text()) | changes
    del contents["sha256"]
    (path / MANIFEST).write_text(as_text(contents | {"sha256": digest(contents)}))


def names_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / MANIFEST).read_text())["files"])


def extra(path: Path) -> None:
    (path / "more" / "config.json").write_text("{}")


def pipe(path: Path) -> None:
    (path / "weights.bin").unlink()
    os.mkfifo(path / "weights.bin")


def pipe_for_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)


def folder_for_file(path: Path) -> None:
    (path / "weights.bin").unlink()
    (path / "weights.bin").mkdir()


def linked_folder(path: Path) -> None:
    (path / "more").rename(path.parent / "elsewhere")
    (path / "more").symlink_to(path.parent / "elsewhere")


def linked_manifest(path: Path) -> None:
    (path / MANIFEST).rename(path.parent / "elsewhere.json")
    (path / MANIFEST).symlink_to(path.parent / "elsewhere.json")


def huge(path: Path) -> None:
    with (path / MANIFEST).open("a") as file:
        file.truncate(LARGEST + 1)


def a_list(path: Path) -> None:
    (path / MANIFEST).write_text("[]\n")


def nested(path: Path) -> None:
    (path / MANIFEST).write_text("[" * 100_000)


def not_a_number(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"size": 3', '"size": NaN'))


def twice(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"run": null', '"run": null,\n  "run": null'))


def another_run(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"run": null', '"run": "other"'))


def no_table(path: Path) -> None:
    forge(path, files=[])


def forged_number(path: Path) -> None:
    forge(path, files=names_of(path) | {"weights.bin": 3})


def forged_absolute(path: Path) -> None:
    forge(path, files=names_of(path) | {"/etc/passwd": {"size": 1, "sha256": ""}})


def forged_escape(path: Path) -> None:
    forge(path, files=names_of(path) | {"../step-00000001/weights.bin": names_of(path)["weights.bin"]})


def forged_nul(path: Path) -> None:
    forge(path, files=names_of(path) | {"a\0b": {"size": 1, "sha256": ""}})


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
    (extra, "more/config.json is not in the manifest of"),
    (pipe, "weights.bin cannot be read as a plain file: no plain file"),
    (pipe_for_manifest, "cannot be read: [Errno 22] no plain file"),
    (folder_for_file, "'weights.bin' is missing"),
    (linked_folder, "more is a link; a checkpoint has plain files only"),
    (linked_manifest, "cannot be read: [Errno 40] Too many levels of symbolic links"),
    (huge, f"it has more than {LARGEST} bytes"),
    (a_list, "manifest.json cannot be used (list indices must be integers"),
    (nested, "manifest.json cannot be used (maximum recursion depth exceeded"),
    (not_a_number, "manifest.json cannot be used (Out of range float values are not JSON compliant"),
    (twice, "manifest.json cannot be used (it is not as it was written)"),
    (another_run, "manifest.json cannot be used (it is not as it was written)"),
    (no_table, "manifest.json cannot be used (its files are no table)"),
    (forged_number, "weights.bin has 3 bytes, its manifest says 3"),
    (forged_absolute, "'/etc/passwd' is missing"),
    (forged_escape, "'../step-00000001/weights.bin' is missing"),
    (forged_nul, "'a\\x00b' is missing"),
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


def test_a_damaged_checkpoint_does_not_hold_anyone_up(tmp_path: Path) -> None:
    """A device in the place of a file is refused, too, and a folder that Finder looked at is whole."""
    path = CheckpointStore(tmp_path).save(1, content("one"))
    (path / ".DS_Store").write_bytes(b"Bud1")
    verify(path)
    os.link(path / "weights.bin", tmp_path / "second name")  # a backup made with links: nothing is ever written there
    verify(path)
    if os.getuid() != 0:
        pytest.skip("only root can make a device")
    (path / "weights.bin").unlink()
    os.mknod(path / "weights.bin", 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero, which never ends
    with pytest.raises(CheckpointError, match=r"weights\.bin cannot be read as a plain file"):
        verify(path)


def test_manifests_without_a_run_are_read(tmp_path: Path) -> None:
    """As they were written before runs had an id."""
    path = CheckpointStore(tmp_path).save(1, content("one"))
    contents = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(as_text({name: contents[name] for name in ("format_version", "files")}))
    assert (CheckpointStore(tmp_path).latest(), run_of(path)) == (path, None)


def test_links_and_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """Whatever lies beside them is neither read nor removed."""
    store = CheckpointStore(tmp_path / "here", keep_last=1)
    outside = CheckpointStore(tmp_path / "outside").save(9, content("outside"))
    first = store.save(1, content("one"))
    (store.directory / "step-00000099").symlink_to(outside)
    for name in ("step-best", "step-0000001", "step-000000001", "step-00000001.bak", "step-٠٠٠٠٠٠٠٩"):
        shutil.copytree(first, store.directory / name)

    assert store.latest() == first
    second = store.save(99, content("two"))
    assert (store.latest(), store.list(), second.is_symlink()) == (second, [second], False)
    verify(outside)
    assert len(names(store.directory)) == 6


def test_retention_goes_by_the_number(tmp_path: Path) -> None:
    """Where it gets another digit, and whatever the clock says: keep_last=1 and the best, which is the oldest."""
    store = CheckpointStore(tmp_path, keep_last=1)
    best = store.save(9, content("best"))
    for number, step in enumerate((10, 99_999_999, 100_000_000, 100_000_009)):
        path = store.save(step, content(str(step)), protect=best)
        os.utime(path, (1e9 - 1e6 * number,) * 2)  # each is older than the one before
        assert (store.list(), store.latest()) == ([best, path], path)


def test_the_one_that_was_just_written_is_never_removed(tmp_path: Path) -> None:
    """Also where damaged ones of later steps count among those to keep."""
    store = CheckpointStore(tmp_path, keep_last=1)
    flip(store.save(8, content("two")))
    for step in (5, 6):
        path = store.save(step, content(str(step)))
        assert store.latest() == path
    assert names(tmp_path) == ["step-00000006", "step-00000008"]


def test_other_runs_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither latest nor retention sees them, and one in the way of a checkpoint gets another name."""
    theirs = CheckpointStore(tmp_path, run="a" * 32)
    old = [theirs.save(step, content(f"theirs {step}")) for step in (4, 99_999)]
    ours = CheckpointStore(tmp_path, keep_last=1, run="b" * 32)

    assert (ours.latest(), ours.list(), ours.others()) == (None, [], old)
    for step in (2, 4):
        path = ours.save(step, content(f"ours {step}"))
    assert CheckpointStore(tmp_path).latest() == path
    assert ours.others() == old[1:]
    assert names(tmp_path) == [".run", "other-step-00000004", "step-00000004", "step-00099999"]
    verify(tmp_path / "other-step-00000004")
    assert (tmp_path / "other-step-00000004" / "weights.bin").read_text() == "theirs 4"
    assert "step-00000004 is another run's; it is other-step-00000004 now" in caplog.text

    ours.save(3, content("again"))
    CheckpointStore(tmp_path, run="c" * 32).save(4, content("a third"))
    assert [name for name in names(tmp_path) if name.startswith("other")] == [
        "other-step-00000004",
        "other-step-00000004-2",
    ]


@pytest.mark.parametrize("damage", ["", "x" * 33, "b" * 1000, "\0" * 33])
def test_a_folder_that_does_not_say_whose_it_is(tmp_path: Path, damage: str) -> None:
    """Is not guessed about; removing the file says that the newest of any run may be taken."""
    path = CheckpointStore(tmp_path, run="a" * 32).save(4, content("four"))
    (tmp_path / ".run").write_text(damage)
    with pytest.raises(CheckpointError, match=r"\.run, which says whose .* is damaged; remove it, and"):
        CheckpointStore(tmp_path).latest()
    (tmp_path / ".run").unlink()
    assert CheckpointStore(tmp_path).latest() == path
    (tmp_path / ".run").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"\.run cannot be read: Too many levels of symbolic links"):
        CheckpointStore(tmp_path).latest()


HOLDER = """
import os, sys
from pathlib import Path
from mlx_trainer.checkpoint import CheckpointStore
with CheckpointStore(Path(sys.argv[1])).held():
    if sys.argv[2:] == ["fork"]:
        os.fork()
    os.write(1, b"held\\n")
    sys.stdin.read()
"""


def holding(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """A process that holds the folder, until it is killed or its input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder), *arguments]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": ROOT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    """It is told who has it; when that one is killed the folder is free at once, and what it left is put in order."""
    store = CheckpointStore(tmp_path)
    with holding(tmp_path) as process:
        with pytest.raises(CheckpointError, match=f"is being written by process {process.pid}; wait"), store.held():
            pass
        process.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [".lock"]
    with store.held(), pytest.raises(CheckpointError, match=f"by process {os.getpid()};"), store.held():
        pass
    assert names(tmp_path) == []


def test_what_is_no_lock_is_not_taken_for_one(tmp_path: Path) -> None:
    """A planted link or pipe is refused at once, and what it leads to stays as it is."""
    store, outside = CheckpointStore(tmp_path / "here"), tmp_path / "outside"
    store.directory.mkdir()
    outside.write_text("outside")
    lock = store.directory / ".lock"
    lock.symlink_to(outside)
    with (
        pytest.raises(CheckpointError, match=r"\.lock cannot be locked: Too many levels"),
        store.held(),
    ):
        pass
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(CheckpointError, match=r"\.lock cannot be locked: No such device"), store.held():
        pass
    assert outside.read_text() == "outside"


@pytest.mark.parametrize("kill", [True, False])
def test_a_forked_child_does_not_hold_the_folder(tmp_path: Path, kill: bool) -> None:
    """Nor does it let go of it: a worker that outlives its run must not keep the next one out."""
    store = CheckpointStore(tmp_path)
    with holding(tmp_path, "fork") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"  # the child's, which goes on
        with pytest.raises(CheckpointError, match=f"by process {process.pid};"), store.held():
            pass
        if kill:
            process.kill()
            process.wait()
            with store.held():
                assert names(tmp_path) == [".lock"]
    assert names(tmp_path) == []


def test_what_killed_saves_left_is_put_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Half-written and half-removed ones go, links without what they lead to; one that was being replaced is back."""
    store = CheckpointStore(tmp_path / "here")
    kept = [store.save(step, content(str(step))) for step in (1, 2, 3)]
    outside = tmp_path / "outside"
    outside.mkdir()
    content("outside")(outside)
    kept[0].rename(store.directory / ".replaced-step-00000001")
    shutil.copytree(kept[1], store.directory / ".replaced-step-00000002")
    shutil.copytree(kept[1], store.directory / ".writing-step-00000001")
    shutil.copytree(kept[1], store.directory / ".removed-step-00000009")
    (store.directory / ".writing-step-00000008").symlink_to(outside)
    (store.directory / ".writing-file").write_text("")

    assert store.list() == kept[1:]
    with store.held():
        assert names(store.directory) == [".lock", *(path.name for path in kept)]
    for path in kept:
        verify(path)
    assert names(outside) == ["more", "weights.bin"]
    assert caplog.records == []


def test_an_old_one_that_cannot_be_removed_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The new checkpoint is there; the old one is told."""
    store = CheckpointStore(tmp_path, keep_last=1)
    old, rename = store.save(1, content("one")), Path.rename

    def busy(self: Path, target: Path) -> Path:
        if self == old:
            raise OSError(16, "Device or resource busy", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with caplog.at_level(logging.WARNING):
        new = store.save(2, content("two"))
    assert (store.list(), "an old checkpoint cannot be removed" in caplog.text) == ([old, new], True)


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What the run still knows is saved; stopping would lose it."""
    store = CheckpointStore(tmp_path / "run", run="a" * 32)
    store.save(1, content("one"))
    shutil.rmtree(tmp_path / "run")
    path = store.save(2, content("two"))
    assert (CheckpointStore(tmp_path / "run").latest(), "is not there any more; it is made again" in caplog.text) == (
        path,
        True,
    )
