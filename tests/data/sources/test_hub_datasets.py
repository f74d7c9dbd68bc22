"""Hugging Face datasets as sources; `load_dataset` is replaced, as there is no network."""

import json
import logging
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data import DataError, DataPipeline, RowError
from mlx_trainer.data.sources.find import Source, find_sources
from mlx_trainer.data.sources.tables import DatasetSource
from tests.data.conftest import WriteRows

datasets = pytest.importorskip("datasets", reason="datasets are an extra")

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "weight": 1}]}


def table(name: str, count: int) -> Any:
    """A dataset of `count` distinct rows."""
    return datasets.Dataset.from_list([{"text": f"{name} says {number}"} for number in range(count)])


def tables(**counts: int) -> Any:
    """A DatasetDict of splits with so many rows."""
    return datasets.DatasetDict({name: table(name, count) for name, count in counts.items()})


def joined(rows: list[dict[str, Any]]) -> Any:
    """A dataset of rows with different keys: each has all columns, null where it lacks one."""
    columns = {key: None for row in rows for key in row}
    return datasets.Dataset.from_list([columns | row for row in rows])


def values(source: Source) -> list[Any]:
    """The rows of a source, of which none is bad."""
    return [line.value for line in source.lines()]


def names(sources: tuple[Source, ...]) -> list[str]:
    """The names of sources."""
    return [source.name for source in sources]


def test_a_dataset_gives_the_rows_of_its_file(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows, split and order are those of a JSONL file with the same rows; they are named by number from 1."""
    caplog.set_level(logging.INFO)
    rows = [CHAT, *({"prompt": f"{n}?", "completion": f"{n}!"} for n in range(9)), {"text": "a"}]
    dataset = DataPipeline(joined(rows), tokenizer, train_split=0.5)
    file = DataPipeline(write_rows(rows), tokenizer, train_split=0.5)
    for side in ("train_rows", "validation_rows"):
        ours, theirs = getattr(dataset, side), getattr(file, side)
        assert [row.ids.tolist() for row in ours] == [row.ids.tolist() for row in theirs]
        assert [row.source for row in ours] == [row.source.replace("chats.jsonl", "dataset") for row in theirs]
    assert "dataset: 9 prompt/completion rows" in caplog.text


def test_nulls_are_absent_columns() -> None:
    """Columns and keys of messages that a table had to fill with null are gone, and nulls in lists stay."""
    rows = [CHAT, {"text": "a", "list": [None, 1]}, {"tool": {"name": "x", "arguments": {"b": 1}}}]
    assert values(DatasetSource(joined(rows), "x")) == [
        {"messages": [{"content": "2+2?", "role": "user"}, {"content": "4", "role": "assistant", "weight": 1}]},
        rows[1],
        rows[2],
    ]


def test_formats_of_values() -> None:
    """Arrays are given as Python's values, of the chosen columns; a transform of the user's is applied."""
    rows = datasets.Dataset.from_list([{"text": "a", "ids": [1, 2], "id": 7}, {"text": "b", "ids": [3], "id": 8}])
    arrays = rows.with_format("numpy", columns=["text", "ids"])
    assert values(DatasetSource(arrays, "x")) == [{"text": "a", "ids": [1, 2]}, {"text": "b", "ids": [3]}]
    assert type(next(iter(values(DatasetSource(arrays, "x"))))["text"]) is str
    loud = rows.with_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})
    assert values(DatasetSource(loud, "x")) == [{"text": "A"}, {"text": "B"}]
    other = rows.with_transform(lambda batch: {"text": [date(2020, 1, 1) for _ in batch["text"]]})
    assert values(DatasetSource(other, "x")) == [{"text": date(2020, 1, 1)}] * 2


@pytest.mark.parametrize("held_out", ["validation", "valid"])
def test_splits(caplog: pytest.LogCaptureFixture, held_out: str) -> None:
    """Of a DatasetDict, train is trained, validation held out and test left alone, which is told."""
    caplog.set_level(logging.INFO)
    sources = find_sources(tables(**{"train": 3, held_out: 2, "test": 1}))
    assert (names(sources.train), names(sources.validation)) == (["train"], [held_out])
    assert values(sources.validation[0]) == [{"text": f"{held_out} says 0"}, {"text": f"{held_out} says 1"}]
    assert "dataset test is left alone: no row of it is read" in caplog.text
    assert find_sources(tables(train=3, test=1)).validation == ()


def test_what_is_held_out_instead(write_rows: WriteRows) -> None:
    """A `validation_path` stands in for the dataset's own split: a file, a split, or a dataset's validation split."""
    both = tables(train=3, validation=2)
    file = write_rows([CHAT], "held.jsonl")
    assert names(find_sources(both, file).validation) == ["held.jsonl"]
    assert values(find_sources(file, both["train"]).validation[0])[0] == {"text": "train says 0"}
    assert values(find_sources(file, both).validation[0])[0] == {"text": "validation says 0"}
    assert values(find_sources(both, table("own", 1)).validation[0]) == [{"text": "own says 0"}]
    assert names(find_sources(tables(train=1, valid=1, validation=1), file).validation) == ["held.jsonl"]


def test_datasets_that_cannot_be_used() -> None:
    """No train split, two to hold out, none to hold out, no row, and streamed rows are refused."""
    for data, held_out, message in (
        (tables(train_sft=1, test_sft=1), None, r"no split named train; it has train_sft, test_sft\. Give the one to"),
        (datasets.DatasetDict(), None, "it has none"),
        (tables(train=1, valid=1, validation=1), None, "has both valid and validation"),
        (table("a", 1), tables(train=1, test=1), "to hold out has no split named validation; it has train, test"),
        (table("a", 1).to_iterable_dataset(), None, "is streamed, so its rows cannot be split"),
        (datasets.IterableDatasetDict({"train": table("a", 1).to_iterable_dataset()}), None, "is streamed"),
    ):
        with pytest.raises(DataError, match=message):
            find_sources(data, held_out)
    with pytest.raises(DataError, match=r"^dataset has no row\."):
        list(find_sources(table("a", 0)).train[0].lines())


def test_several_datasets(write_rows: WriteRows, caplog: pytest.LogCaptureFixture) -> None:
    """Datasets mix with files; those of one name are told apart, their own held-out rows are left alone."""
    caplog.set_level(logging.INFO)
    one, other = table("a", 2), table("b", 2)
    data: Any = [one, other, tables(train=1, validation=1), write_rows([CHAT])]
    sources = find_sources(data)
    assert names(sources.train) == [f"dataset-{t._fingerprint[:8]}" for t in (one, other)] + ["train", "chats.jsonl"]
    assert sources.validation == ()
    assert "dataset validation is left alone" in caplog.text
    with pytest.raises(DataError, match=r"^dataset-\w{8} is given 2 times"):
        find_sources([one, one])


def test_fingerprints_follow_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows have one fingerprint whatever their name; other rows, a selection or another version have others."""
    one = DatasetSource(table("a", 3), "x").fingerprint()
    assert one == DatasetSource(table("a", 3), "y").fingerprint(Path("memory"))
    others = [table("a", 4), table("b", 3), table("a", 3).select([0, 1]), table("a", 3).select([2, 1, 0])]
    prints = [DatasetSource(other, "x").fingerprint() for other in others]
    monkeypatch.setattr(datasets, "__version__", "99")
    prints.append(DatasetSource(table("a", 3), "x").fingerprint())
    assert len({one, *prints}) == 6


@pytest.mark.parametrize("count", [1, 1023, 1024, 2500])
def test_progress_adds_up_to_the_rows(count: int) -> None:
    """Progress is told in rows, a thousand at a time."""
    source, told = DatasetSource(table("a", count), "x"), list[int]()
    assert [line.number for line in source.lines(told.append)] == list(range(1, count + 1))
    assert sum(told) == source.size_hint() == count
    assert len(told) == -(-count // 1024)


def test_rows_that_are_no_objects() -> None:
    """A row of another kind, as a transform may give, is a bad row."""

    class Odd(list[object]):
        _fingerprint, split, format = "x", None, {"type": None, "columns": []}

    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    first, second = (line.value for line in DatasetSource(Odd([3, {"a": deep}]), "x").lines())  # type: ignore[arg-type]
    assert (type(first), str(first)) == (RowError, "expected an object of columns, got int")
    assert (type(second), str(second)) == (RowError, "nested too deeply to be a row")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What `load_dataset` is called with; it gives what the package itself reads from local files."""
    calls: list[tuple[Any, ...]] = []
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    for split, path in files.items():
        Path(path).write_text("".join(json.dumps({"text": f"{split} {n}"}) + "\n" for n in range(3)))
    whole = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))

    def load_dataset(*arguments: Any) -> Any:
        calls.append(arguments)
        return whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_names_of_the_hub(loaded: list[tuple[Any, ...]]) -> None:
    """`hf:owner/name` and `hf:owner/name:config` load that dataset, and nothing else is asked for."""
    sources = find_sources("hf:owner/name")
    assert (names(sources.train), names(sources.validation)) == (["owner/name/train"], ["owner/name/validation"])
    assert values(sources.train[0]) == [{"text": f"train {n}"} for n in range(3)]
    mixed = find_sources({"hf:owner/name:easy": 2.5, "hf:other/n.a-m_e": 1}, "hf:third/name")
    assert names(mixed.train) == ["owner/name:easy/train", "other/n.a-m_e/train"]
    assert [source.weight for source in mixed.train] == [2.5, 1]
    assert names(mixed.validation) == ["third/name/validation"]
    assert loaded == [("owner/name", None), ("third/name", None), ("owner/name", "easy"), ("other/n.a-m_e", None)]


@pytest.mark.parametrize("name", ["hf:", "hf:squad", "hf:a/b/c", "hf:a/b:", "hf:a/b:c:d", "hf:../x y", "hf:a/b\n"])
def test_names_that_are_none(loaded: list[tuple[Any, ...]], name: str) -> None:
    """Another form of name is refused before anything is loaded."""
    with pytest.raises(DataError, match=r"names no dataset of the Hub\. Give hf:owner/name or hf:owner/name:config\.$"):
        find_sources(name)
    assert loaded == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("Dataset 'a/b' doesn't exist\nor cannot be accessed"), "Dataset 'a/b' doesn't exist"),
        (ConnectionError(), "ConnectionError"),
        (ValueError("BuilderConfig 'c' not found."), r"BuilderConfig 'c' not found\."),
    ],
)
def test_what_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str) -> None:
    """Whatever `load_dataset` raises is told with the name, by its first line."""

    def load_dataset(*_: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=rf"^hf:a/b:c cannot be loaded: {reason}\.? Is the name right, and the Hub"):
        find_sources("hf:a/b:c")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where datasets is not installed, the error names the extra, and files can be read all the same."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r"^hf:a/b takes the datasets package, .*: pip install 'mlx-trainer\[datasets\]'\.$"
    ):
        find_sources("hf:a/b")
    assert names(find_sources("a.jsonl").train) == ["a.jsonl"]
