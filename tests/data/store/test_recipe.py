"""The key of a token store: what decides the tokens is in it, and nothing else."""

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data import DataPipeline
from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.samples.conversation import Sample, Text
from mlx_trainer.data.samples.formats import FORMATS, register_format
from mlx_trainer.data.sources.files import FileSource
from mlx_trainer.data.sources.mapping import FieldMapping
from mlx_trainer.data.store import recipe
from mlx_trainer.data.store.recipe import Recipe
from tests.data.conftest import WriteRows
from tests.data.tokenizers_for_tests import CHATML, CHATML_WITH_MARKS, byte_level_mistral, chatml_tokenizer


def key(
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    fields: dict[str, str] | None = None,
    roles: dict[str, str] | None = None,
    fingerprint: str = "rows",
    **changes: Any,
) -> str:
    """The key of some rows, encoded for ChatML unless told otherwise."""
    tokenizer = tokenizer or chatml_tokenizer()
    style, most = changes.get("completion_style", "chat"), changes.get("max_seq_length", 64)
    encoder = SampleEncoder.of(tokenizer, style)
    mapping = FieldMapping(fields or {}, roles or {})
    return Recipe(tokenizer, encoder, mapping, most, changes.get("truncation", "truncate")).key(fingerprint)


def with_token(token: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token more."""
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens([token])
    return tokenizer


CHANGES: dict[str, Callable[[], str]] = {
    "nothing": key,
    "vocabulary": lambda: key(with_token("capital")),
    "another token": lambda: key(with_token("France")),
    "family": lambda: key(byte_level_mistral()),
    "template": lambda: key(chatml_tokenizer(CHATML_WITH_MARKS)),
    "no template": lambda: key(chatml_tokenizer(None)),
    "eos": lambda: key(chatml_tokenizer(eos_token="<|endoftext|>")),
    "bos": lambda: key(chatml_tokenizer(bos_token="<|endoftext|>")),
    "completion_style": lambda: key(completion_style="raw"),
    "max_seq_length": lambda: key(max_seq_length=65),
    "truncation": lambda: key(truncation="split"),
    "fields": lambda: key(fields={"prompt": "question"}),
    "other fields": lambda: key(fields={"prompt": "query"}),
    "roles": lambda: key(roles={"bot": "assistant"}),
    "other roles": lambda: key(roles={"bot": "user"}),
    "rows": lambda: key(fingerprint="other rows"),
}


def test_each_difference_alone_makes_another_key() -> None:
    """Each thing that decides the tokens changes the key, by itself, and each to a key of its own."""
    keys = {name: change() for name, change in CHANGES.items()}
    assert len(set(keys.values())) == len(CHANGES)
    assert {len(value) for value in keys.values()} == {40}


def test_the_same_recipe_has_the_same_key() -> None:
    """Recipes made anew of equal parts have one key, in whatever order fields and roles are given."""
    assert {name: change() for name, change in CHANGES.items()} == {name: change() for name, change in CHANGES.items()}
    names = {"prompt": "question", "completion": "answer"}
    assert key(fields=names) == key(fields=dict(reversed(names.items())))


def test_a_special_token_counts_where_the_template_has_it() -> None:
    """The token for padding changes the key of a template that writes it, and of no other."""
    writes = CHATML + "{{ pad_token }}"
    one, other = ({"pad_token": token} for token in ("<|endoftext|>", "<|im_end|>"))
    assert key(chatml_tokenizer(writes, **one)) != key(chatml_tokenizer(writes, **other))
    assert key(chatml_tokenizer(**one)) == key(chatml_tokenizer(**other))


def test_another_release_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of what encodes rows and this package's own files are in the key."""
    keys = {key()}
    monkeypatch.setattr(recipe, "VERSIONS", "others")
    keys.add(key())
    monkeypatch.setattr(recipe, "source_code", lambda: "other code")
    keys.add(key())
    assert len(keys) == 3


def test_how_others_use_the_tokenizer_changes_nothing() -> None:
    """Calls that pad or truncate leave their settings in the tokenizer; rows are encoded without, so the key stays."""
    tokenizer = chatml_tokenizer(pad_token="<|endoftext|>")
    before = key(tokenizer)
    tokenizer(["a user", "a"], padding="max_length", truncation=True, max_length=8)
    assert tokenizer.backend_tokenizer.padding is not None
    assert key(tokenizer) == before


@pytest.fixture
def formats() -> Iterator[dict[str, Any]]:
    """The formats, which are put back as they were."""
    before = dict(FORMATS)
    yield FORMATS
    FORMATS.clear()
    FORMATS.update(before)


def from_file(path: Path, code: str) -> Callable[[Any], Text]:
    """The function `parse` of a file with `code`."""
    path.write_text(f"from mlx_trainer.data.samples.conversation import Text\n\n\n{code}\n")
    spec = util.spec_from_file_location("own_format", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["own_format"] = module
    spec.loader.exec_module(module)
    parse: Callable[[Any], Text] = module.parse
    return parse


def test_a_registered_format(tmp_path: Path, formats: dict[str, Any]) -> None:
    """The file of a registered format, its name and its keys are in the key; taken out, the key is as before."""
    built_in = dict(formats)

    def registered(code: str, name: str = "own", *keys: str) -> str:
        formats.clear()
        formats.update(built_in)
        register_format(name, *(keys or ("say",)))(from_file(tmp_path / "own_format.py", code))
        return key()

    first = registered('def parse(row):\n    return Text(row["say"])')
    assert registered('def parse(row):\n    return Text(row["say"])') == first
    others = [
        registered('def parse(row):\n    return Text(row["say"] + "!")'),
        registered('def parse(row):\n    return Text(row["say"])', "other"),
        registered('def parse(row):\n    return Text(row["say"])', "own", "say", "it"),
    ]
    formats.clear()
    formats.update(built_in)
    assert len({first, *others, key()}) == 5


def test_the_order_of_formats_counts(tmp_path: Path, formats: dict[str, Any]) -> None:
    """The first format whose keys are there reads a row, so their order is in the key."""
    parse = from_file(tmp_path / "own_format.py", 'def parse(row):\n    return Text(row["a"])')
    register_format("one", "a")(parse)
    register_format("two", "a")(parse)
    before = key()
    one = formats.pop("one")
    two = formats.pop("two")
    others = dict(formats)
    formats.clear()
    formats.update({"one": one, "two": two, **others})
    assert key() != before


def prefixed(prefix: str, row: Any) -> Sample:
    """A text with something before it."""
    return Text(prefix + str(row["say"]))


def test_a_format_that_cannot_be_told_is_never_the_same(formats: dict[str, Any]) -> None:
    """Values bound to a function are in no file; so a store of its rows is never taken for that of another."""
    keys = set()
    for prefix in ("a", "b", "b"):
        formats.pop("own", None)
        register_format("own", "say")(partial(prefixed, prefix))
        keys.add(key())

    def bound(suffix: str) -> Callable[[Any], Sample]:
        return lambda row: Text(str(row["say"]) + suffix)

    for suffix in ("a", "b"):
        formats.pop("own")
        register_format("own", "say")(bound(suffix))
        keys.add(key())
    assert len(keys) == 5


def test_name_path_seed_and_batch_size_share_a_store(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Files of the same bytes have one store, whatever their names, and however their rows are batched."""
    rows = [{"prompt": f"two plus {i}?", "completion": str(i + 2)} for i in range(20)]
    here = write_rows(rows)
    (tmp_path / "other").mkdir()
    there = write_rows(rows, "other/train.jsonl")
    cache = tmp_path / "cache"
    DataPipeline(here, tokenizer, cache_dir=cache)
    folders = {path.name for path in (cache / "tokens").iterdir()}
    DataPipeline(there, tokenizer, cache_dir=cache, seed=7, batch_size=5, train_split=0.5, shuffle=False)
    DataPipeline(there, tokenizer, cache_dir=cache, batch_tokens=512, layout="unpadded", num_workers=2)
    assert {path.name for path in (cache / "tokens").iterdir()} == folders
    assert len(folders) == 1
    there.write_text(there.read_text() + json.dumps(rows[0]) + "\n")
    DataPipeline(there, tokenizer, cache_dir=cache)
    assert len([*(cache / "tokens").iterdir()]) == 2


def test_source_bytes_decide(write_rows: WriteRows) -> None:
    """A letter more in the file is another fingerprint; the same bytes elsewhere have the same."""
    first, same, other = (
        FileSource.of(write_rows([{"text": text}], name)).fingerprint()
        for text, name in (("a", "1.jsonl"), ("a", "2.jsonl"), ("b", "3.jsonl"))
    )
    assert (first == same, first == other) == (True, False)
