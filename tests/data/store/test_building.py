"""Making token stores: once, whole or not at all, whatever happens to the process, the disk or the file meanwhile."""

import errno
import logging
import os
import pty
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mlx_trainer.data import DataError
from mlx_trainer.data.encoding.tokenizer import TextEncoder
from mlx_trainer.data.sources import files
from mlx_trainer.data.sources.files import FileSource, Progress
from mlx_trainer.data.sources.jsonl import Line
from mlx_trainer.data.store import parsing, progress
from mlx_trainer.data.store.building import PARTIAL, lock_of, open_store
from mlx_trainer.data.store.store import FACTS, TokenStore
from mlx_trainer.data.store.writing import StoreWriter
from mlx_trainer.folders import locked
from tests.data.builders import ROOT, command, content, finished, recipe_of, start, write_texts

ROWS = 3000
SLOW = {"pause_s": 0.03, "together": 64}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of some thousand texts."""
    return write_texts(tmp_path / "texts.jsonl", ROWS)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder."""
    return tmp_path / "cache"


def build(rows: Path, cache: Path) -> TokenStore:
    """The store of `rows`, made here if it is not there."""
    return open_store(FileSource.of(rows), recipe_of(), cache)


def there(cache: Path) -> list[str]:
    """Everything beside the stores, and they themselves, by name."""
    return sorted(path.name for path in (cache / "tokens").iterdir())


def is_whole(store: TokenStore) -> bool:
    """Whether every row can be read."""
    return [len(store.row(i)) for i in range(store.facts.rows)] == store.column("length").tolist()


def test_a_second_start_neither_reads_nor_encodes(rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is there is opened: not one row is read, and not one text encoded."""
    calls: list[str] = []
    read, encode = FileSource.lines, TextEncoder.encode_flat

    def counted_lines(source: FileSource, progress: Progress | None = None) -> Iterator[Line]:
        calls.append("lines")
        return read(source, progress)

    def counted_encode(encoder: TextEncoder, texts: list[str]) -> object:
        calls.append("encode")
        return encode(encoder, texts)

    monkeypatch.setattr(FileSource, "lines", counted_lines)
    monkeypatch.setattr(TextEncoder, "encode_flat", counted_encode)
    first = build(rows, cache)
    assert calls == ["lines", *["encode"] * 3]
    second = build(rows, cache)
    assert calls == ["lines", *["encode"] * 3]
    assert content(first.folder) == content(second.folder)


def killed(rows: Path, cache: Path, moment: float | str, ready: Path) -> None:
    """Start to build, and be killed so many seconds after, or at this step of it."""
    if isinstance(moment, str):
        process = start(rows, cache, die=moment)
    else:
        process = start(rows, cache, ready=str(ready), **SLOW)
        while not ready.exists():
            time.sleep(0.002)
        time.sleep(moment)
        process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_process_leaves_none_or_a_whole_store(rows: Path, cache: Path, tmp_path: Path) -> None:
    """Killed at any moment, right before and after the store is put in place too, the next start has the same bytes."""
    right = content(build(rows, tmp_path / "reference").folder)
    left: list[str] = []
    for moment in (0.0, 0.03, 0.1, 0.2, 0.4, "before rename", "after rename"):
        killed(rows, cache, moment, tmp_path / f"ready {moment}")
        folders = [path for path in (cache / "tokens").glob("*") if path.is_dir()]
        assert len(folders) <= 1  # what the one before left is gone
        for store in (path for path in folders if path.suffix != PARTIAL):
            assert content(store) == right
        left += [path.suffix or "whole" for path in folders]
    assert (left[-2:], len(left) > 3) == ([PARTIAL, "whole"], True)  # some of the others were killed while they wrote
    store = build(rows, cache)
    assert (content(store.folder), is_whole(store)) == (right, True)
    shutil.rmtree(store.folder)
    killed(rows, cache, "before rename", tmp_path)
    assert content(build(rows, cache).folder) == right
    assert there(cache) == [store.folder.name]


def test_two_processes_share_the_work(rows: Path, cache: Path) -> None:
    """Of two that start at once one builds and the other waits; both read the same store, and nothing is left."""
    told = [finished(process) for process in [start(rows, cache, **SLOW) for _ in range(2)]]
    assert told[0]["store"] == told[1]["store"]
    waited = ["another process is encoding these rows; waiting for it" in each["log"] for each in told]
    assert sorted(waited) == [False, True]
    assert there(cache) == [Path(told[0]["store"]).name]


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "rows.bin", FACTS])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_store_is_made_again(rows: Path, cache: Path, name: str, damage: str) -> None:
    """A store with a file that is cut or missing is replaced by a whole one."""
    store = build(rows, cache)
    right = content(store.folder)
    path = store.folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-5])
    assert content(build(rows, cache).folder) == right
    assert there(cache) == [store.folder.name]


def test_what_killed_builders_left_is_removed(rows: Path, cache: Path) -> None:
    """Half-made stores go, of rows that are no longer there too, but not that of a builder that is at work."""
    store = build(rows, cache)
    shutil.rmtree(store.folder)
    left = [cache / "tokens" / f"{key}.xy{PARTIAL}" for key in (store.folder.name, "0" * 40, "1" * 40)]
    for folder in left:
        folder.mkdir()
        (folder / "ids.bin").write_bytes(b"half")
    with locked(lock_of(cache / "tokens" / ("1" * 40))) as held:
        assert held
        build(rows, cache)
        assert [folder.exists() for folder in left] == [False, False, True]


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path: Path) -> None:
    """Whoever cannot wait is told so; afterwards the file is gone, and whoever comes next holds a new one."""
    path = tmp_path / "a.lock"
    with locked(path) as first:
        with locked(path) as second:
            assert (first, second) == (True, False)
        assert path.exists()
    assert not path.exists()
    with suppress(KeyError), locked(path):
        raise KeyError
    assert not path.exists()


def test_a_full_disk_is_explained(rows: Path, cache: Path) -> None:
    """Where files cannot grow, one error names the folder and what to do, and nothing is left; then it works."""
    error = finished(start(rows, cache, file_size=20_000))["DataError"]
    assert error.startswith(f"The encoded rows cannot be kept in {cache}: ")
    assert error.endswith(
        "Free space there, or name another folder: data.cache_dir, or the environment variable MLX_TRAINER_CACHE."
    )
    assert there(cache) == []
    assert is_whole(build(rows, cache))


@pytest.mark.parametrize("step", ["add", "finish"])
def test_no_space_at_any_step_is_explained(rows: Path, cache: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the system says that no space is left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoreWriter, step, full)
    with pytest.raises(DataError, match=r"cannot be kept in .*cache: No space left on device\. Free space there"):
        build(rows, cache)
    assert there(cache) == []


def test_a_cache_that_is_no_folder_is_explained(rows: Path, cache: Path) -> None:
    """A cache where no folder can be made gives the same error."""
    cache.write_text("a file")
    with pytest.raises(DataError, match=r"cannot be kept in .*cache: .* name another folder: data\.cache_dir"):
        build(rows, cache)
    assert cache.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_cache(rows: Path, cache: Path) -> None:
    """A cache that may not be written gives the same error; one that holds the store already is read."""
    build(rows, cache)
    other = write_texts(rows.with_name("other.jsonl"), 10)
    (cache / "tokens").chmod(0o500)
    try:
        assert is_whole(build(rows, cache))
        with pytest.raises(DataError, match=r"cannot be kept in .*cache: Permission denied\. Free space there"):
            build(other, cache)
    finally:
        (cache / "tokens").chmod(0o700)


class Changing(FileSource):
    """A file that is changed when half of it is read; where it is told to be sly, with size and time as they were."""

    sly = False

    def lines(self, progress: Progress | None = None) -> Iterator[Line]:
        """The lines of what is there at first."""
        status = self.path.stat()
        for line in super().lines(progress):
            if line.number == ROWS // 2:
                data = self.path.read_bytes()
                self.path.write_bytes(data.replace(b"row 7 ", b"row 8 ") if self.sly else data + b'{"text": "more"}\n')
                if self.sly:
                    os.utime(self.path, ns=(status.st_atime_ns, status.st_mtime_ns))
            yield line


@pytest.mark.parametrize("sly", [False, True])
def test_a_file_that_changes_meanwhile(rows: Path, cache: Path, sly: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes while it is read raises and leaves nothing, even where its size and time stay the same."""
    monkeypatch.setattr(Changing, "sly", sly)
    with pytest.raises(DataError, match=r"texts\.jsonl changed while it was read\. Start again"):
        open_store(Changing.of(rows), recipe_of(), cache)
    assert there(cache) == []


class Vanishing(FileSource):
    """A file that is removed while it is read."""

    def lines(self, progress: Progress | None = None) -> Iterator[Line]:
        """The lines."""
        for line in super().lines(progress):
            self.path.unlink(missing_ok=True)
            yield line


def test_a_file_that_is_removed_meanwhile(rows: Path, cache: Path) -> None:
    """An error of reading names the file, and does not blame the cache."""
    with pytest.raises(DataError, match=r"texts\.jsonl cannot be read to its end: No such file or directory\."):
        open_store(Vanishing.of(rows), recipe_of(), cache)
    assert there(cache) == []


def test_an_error_in_the_rows_leaves_nothing(rows: Path, cache: Path) -> None:
    """A file that turns out to be damaged raises its own error."""
    damaged = rows.with_suffix(".gz")
    damaged.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="is no valid gzip file"):
        build(damaged, cache)
    assert there(cache) == []


def test_unused_stores_are_removed(rows: Path, cache: Path) -> None:
    """A store that nobody opened for more than 30 days goes when another is made; opening one counts as use."""
    day = 86400
    stores = [build(write_texts(rows.with_name(f"{i}.jsonl"), 10 + i), cache) for i in range(3)]
    for store, days in zip(stores, (31, 29, 31), strict=True):
        os.utime(store.folder / FACTS, (time.time() - days * day,) * 2)
    build(rows.with_name("2.jsonl"), cache)
    new = build(rows, cache)
    assert there(cache) == sorted(store.folder.name for store in (*stores[1:], new))


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Twenty times as many rows take no more memory; encoded all at once, they would."""
    few = write_texts(tmp_path / "few.jsonl", 2_000, letters=200)
    many = write_texts(tmp_path / "many.jsonl", 40_000, letters=200)
    small, large, at_once = (
        finished(start(file, tmp_path / "cache" / str(i), **options))["peak"]
        for i, (file, options) in enumerate([(few, {}), (many, {}), (many, {"together": 1 << 30})])
    )
    assert large - small < 24 << 20
    assert at_once - small > 48 << 20


def test_a_bar_in_a_terminal(rows: Path, cache: Path) -> None:
    """Where errors go to a terminal, a bar with the file's name and a percentage is drawn there."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        command(rows, cache, **SLOW, chunk=4096),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 1 << 16):
            shown += part
    except OSError:  # how Linux tells the end of a terminal
        pass
    os.close(master)
    assert process.wait() == 0
    assert b"encoding texts.jsonl" in shown
    assert "━".encode() in shown
    assert b"%" in shown


def test_log_lines_elsewhere(
    rows: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal the percentage is logged now and then, and not at all while little time has passed."""
    caplog.set_level(logging.INFO)
    build(rows, cache)
    assert "encoding" not in caplog.text
    monkeypatch.setattr(progress, "SAID_EVERY_S", 0.0)
    monkeypatch.setattr(files, "CHUNK", rows.stat().st_size // 4 + 1)
    build(rows, cache.with_name("other"))
    shares = [message for message in caplog.messages if message.startswith("encoding")]
    assert shares == [f"encoding texts.jsonl: {share} %" for share in (25, 50, 75, 100)]


def test_parts_are_bounded() -> None:
    """Rows are encoded in parts of so many rows, or until they have so many bytes."""
    lines = [Line(i, {}, size) for i, size in enumerate([1] * 1500 + [1 << 20] * 5)]
    parts = [*parsing.parts(lines)]
    assert [line for part in parts for line in part] == lines
    assert [len(part) for part in parts] == [1024, 478, 3]
