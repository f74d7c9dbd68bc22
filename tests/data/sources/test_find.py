"""Files, folders, lists and compressed files: which rows are read, and how they are named."""

import gzip
import json
import logging
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data import BatchLoader, DataError, DataPipeline
from mlx_trainer.data.sources.files import FileSource
from mlx_trainer.data.sources.find import Sources, find_sources
from mlx_trainer.data.sources.jsonl import split_lines
from tests.data.conftest import WriteRows


def texts(name: str, count: int) -> list[dict[str, Any]]:
    """`count` distinct rows."""
    return [{"text": f"{name} says {number}"} for number in range(count)]


def names(loader: BatchLoader | None) -> list[str]:
    """Sources of all rows of one iteration, sorted."""
    return sorted(source for batch in loader or () for source in batch.metadata.rows)


@pytest.mark.parametrize("held_out", ["valid.jsonl", "validation.jsonl"])
def test_a_folder(
    tmp_path: Path,
    write_rows: WriteRows,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    held_out: str,
) -> None:
    """Of a folder, train is trained, valid held out whole, and test not read, which is told."""
    caplog.set_level(logging.INFO)
    for name, count in (("train.jsonl", 3), (held_out, 2), ("test.jsonl", 1), ("other.jsonl", 5)):
        write_rows(texts(name, count), name)
    pipeline = DataPipeline(tmp_path, tokenizer, train_split=0.5)
    assert names(pipeline.train_loader()) == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert names(pipeline.validation_loader()) == [f"{held_out}:1", f"{held_out}:2"]
    assert f"{tmp_path / 'test.jsonl'} is left for tests: no row of it is read" in caplog.text


def test_a_folder_without_rows_to_hold_out(
    tmp_path: Path, write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Without valid, train is split as a file is; a `validation_path` is held out whatever the folder has."""
    file = write_rows(texts("a", 10), "train.jsonl")
    folder, alone = (DataPipeline(path, tokenizer, train_split=0.7) for path in (str(tmp_path), file))
    assert names(folder.train_loader()) == names(alone.train_loader())
    assert len(names(folder.validation_loader())) == 3
    write_rows(texts("b", 2), "valid.jsonl")
    other = write_rows(texts("c", 1), "other.jsonl")
    assert find_sources(tmp_path, other).validation == (FileSource(other, "other.jsonl"),)


def test_folders_that_cannot_be_used(tmp_path: Path, write_rows: WriteRows) -> None:
    """A folder without train, one with two files of a kind, a folder in a list, and no file at all are refused."""
    with pytest.raises(DataError, match=r"a directory without train\.jsonl; it holds nothing\. Give the path of one"):
        find_sources(tmp_path)
    write_rows(texts("a", 1), "valid.jsonl")
    with pytest.raises(DataError, match=r"without train\.jsonl; it holds valid\.jsonl\."):
        find_sources(tmp_path)
    write_rows(texts("a", 1), "train.jsonl")
    write_rows(texts("a", 1), "validation.jsonl.gz")
    with pytest.raises(DataError, match=r"has both valid\.jsonl and validation\.jsonl\.gz\. Leave one of them there"):
        find_sources(tmp_path)
    with pytest.raises(DataError, match=r"The list of data files is empty\. Give one JSONL file or more"):
        find_sources([])
    with pytest.raises(DataError, match=r"is a directory\. Give the path of one JSONL file"):
        list(find_sources([tmp_path, tmp_path / "train.jsonl"]).train[0].lines())


def test_several_files_are_one(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Files in a list give the rows and the split of one file with the same lines, each named by its own file."""
    rows = texts("a", 12)
    whole = DataPipeline(write_rows(rows), tokenizer, train_split=0.5)
    parts = [write_rows(rows[:5], "a.jsonl"), write_rows(rows[5:], "b.jsonl")]
    joined = DataPipeline(parts, tokenizer, train_split=0.5)
    renamed = {f"chats.jsonl:{i + 1}": f"a.jsonl:{i + 1}" if i < 5 else f"b.jsonl:{i - 4}" for i in range(12)}
    for rows_whole, rows_joined in (
        (whole.train_rows, joined.train_rows),
        (whole.validation_rows, joined.validation_rows),
    ):
        assert [renamed[row.source] for row in rows_whole] == [row.source for row in rows_joined]
        assert [row.ids.tolist() for row in rows_whole] == [row.ids.tolist() for row in rows_joined]
        assert rows_whole.numbers.tolist() == rows_joined.numbers.tolist()
    assert joined.summary == whole.summary


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Rows of files with the same name are named by their paths, the others by their file."""
    paths = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl", tmp_path / "y.jsonl"]
    first, second, third = map(FileSource, paths, [*map(str, paths[:2]), "y.jsonl"])
    assert find_sources([first.path, third.path], second.path) == Sources((first, third), (second,))


def test_gzip(tmp_path: Path) -> None:
    """A gzip file has the lines and numbers of the file it was made from."""
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": "b"}'))
    assert [(line.number, line.value) for line in FileSource.of(path).lines()] == [
        (1, {"text": "a"}),
        (3, {"text": "b"}),
    ]


def damaged(whole: bytes) -> dict[str, bytes]:
    """`whole`, a gzip file, with the damage that its name tells."""
    return {
        "plain": b'{"text": "a"}\n',
        "cut": whole[:-9],
        "flipped": whole[:10] + b"\xff" + whole[11:],
        "checksum": whole[:-8] + b"\x00" * 4 + whole[-4:],
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("plain", r"is no valid gzip file: Not a gzipped file"),
        ("cut", r"ends in the middle of its compressed data\. Copy or compress it anew"),
        ("flipped", r"is no valid gzip file: Error -3 while decompressing"),
        ("checksum", r"is no valid gzip file: CRC check failed"),
    ],
)
def test_damaged_gzip(tmp_path: Path, damage: str, message: str) -> None:
    """Damaged gzip data is refused with the file and what to do."""
    path = tmp_path / "chats.jsonl.gz"
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in texts("a", 200))
    path.write_bytes(damaged(gzip.compress(lines))[damage])
    with pytest.raises(DataError, match=rf"chats\.jsonl\.gz {message}"):
        list(FileSource.of(path).lines())


def test_zstd_without_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can read zstd, the error names the package to install."""
    for module in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "chats.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError, match=r"chats\.jsonl\.zst is compressed with zstd, .* \(pip install zstandard\)"):
        list(FileSource.of(path).lines())


@pytest.fixture(params=["standard library", "zstandard"])
def compress(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], bytes]:
    """What makes a frame that the module of this name reads; zlib stands in for Python 3.14's, whose shape it has."""
    if request.param == "standard library":
        module = SimpleNamespace(ZstdDecompressor=zlib.decompressobj, ZstdError=zlib.error)
        monkeypatch.setitem(sys.modules, "compression.zstd", module)
        return zlib.compress
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    zstandard = pytest.importorskip("zstandard", reason="reading zstd before Python 3.14 takes the zstandard package")
    made: Callable[[bytes], bytes] = zstandard.compress
    return made


def test_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]) -> None:
    """A file of two frames, read in small parts, has the lines of both; damage is refused with the file."""
    monkeypatch.setattr("mlx_trainer.data.sources.zstd.CHUNK", 7)
    path = tmp_path / "chats.jsonl.zst"
    rows = texts("é", 50)
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    first, second = (compress(b"".join(part)) for part in (lines[:20], lines[20:]))
    path.write_bytes(first + second)
    expected = list(enumerate(rows, start=1))
    assert [(line.number, line.value) for line in FileSource.of(path).lines()] == expected
    for content, message in (
        (first + second[:-3], r"ends in the middle of its compressed data"),
        (first + b"rubbish", r"is no valid zstd file: .*Compress it anew with `zstd`"),
        (b"", r"ends in the middle"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"chats\.jsonl\.zst {message}"):
            list(FileSource.of(path).lines())


def test_lines_across_parts() -> None:
    """Lines come out whole wherever the parts end; a file that ends with a line end has an empty rest."""
    assert list(split_lines([b"a", b"b\nc\n\nd", b"", b"e\n"])) == [b"ab", b"c", b"", b"de", b""]


def test_weights(tmp_path: Path, write_rows: WriteRows) -> None:
    """A mapping gives each file its weight, or each file of a pattern; a folder may stand alone in it."""
    a, b, c = (write_rows(texts(name, 1), f"{name}.jsonl") for name in "abc")
    sources = find_sources({str(a): 2, str(tmp_path / "[bc].jsonl"): 0.5})
    assert [(source.name, source.weight) for source in sources.train] == [
        ("a.jsonl", 2.0),
        ("b.jsonl", 0.5),
        ("c.jsonl", 0.5),
    ]
    assert [source.weight for source in find_sources([a, b, c]).train] == [1.0, 1.0, 1.0]
    write_rows(texts("t", 1), "train.jsonl")
    held_out = write_rows(texts("v", 1), "valid.jsonl")
    alone = find_sources({tmp_path: 3})
    assert [source.weight for source in alone.train] == [3.0]
    assert alone.validation == (FileSource(held_out, "valid.jsonl"),)


@pytest.mark.parametrize(
    "weight", [0, -1, float("nan"), float("inf"), True, "2", None, 10**400], ids=lambda weight: f"{weight!r:.10}"
)
def test_weights_that_are_none(tmp_path: Path, weight: Any) -> None:
    """A weight is a number above 0; held-out rows have none."""
    with pytest.raises(DataError, match=r"^The weight of '.*a\.jsonl' is .*: a number above 0, such as 0\.5 or 2\.$"):
        find_sources({tmp_path / "a.jsonl": weight})
    with pytest.raises(DataError, match="validation_path has weights"):
        find_sources(tmp_path / "a.jsonl", {tmp_path / "b.jsonl": 1})


def test_patterns(tmp_path: Path, write_rows: WriteRows) -> None:
    """A pattern is its files in order, without folders; a file whose name looks like one is that file."""
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write_rows(texts(name, 1), name)
    (tmp_path / "d.jsonl").mkdir()
    pattern = tmp_path / "*.jsonl"
    for path in (pattern, str(pattern), [pattern]):
        assert [source.name for source in find_sources(path).train] == ["a.jsonl", "b.jsonl"]
    assert [source.name for source in find_sources(tmp_path / "c.txt", pattern).validation] == ["a.jsonl", "b.jsonl"]
    literal = write_rows(texts("x", 1), "[ab].jsonl")
    assert find_sources(literal).train == (FileSource(literal, "[ab].jsonl"),)
    with pytest.raises(DataError, match=r"^No file matches '.*x\*'\. Give a pattern such as 'data/\*\.jsonl'"):
        find_sources(tmp_path / "x*")


def test_rows_that_are_given_twice(tmp_path: Path, write_rows: WriteRows) -> None:
    """A file that a pattern and a name both give is refused, as its rows would silently count twice."""
    path = write_rows(texts("a", 1), "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl is given 2 times\. Give it once; to use its rows more often give"):
        find_sources([path, tmp_path / "*.jsonl"])


@pytest.mark.parametrize("data", [3, None, [3], [None], [["a"]]])
def test_what_is_no_data(data: Any) -> None:
    """Anything else than paths and datasets is refused by what it is."""
    with pytest.raises(
        DataError, match=r"^The data is .*\. Give the path of a JSONL file, or a Hugging Face dataset\.$"
    ):
        find_sources(data)
