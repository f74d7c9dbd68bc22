"""Rows and files at the edges of what can be trained, through the whole pipeline to the labels of its batches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_trainer import Trainer
from mlx_trainer.data import DataError, DataPipeline
from mlx_trainer.data.batches.padded import IGNORED
from mlx_trainer.models import CausalLMModule
from tests.tiny import tiny_mistral

ROW = {"messages": [{"role": "user", "content": "dog"}, {"role": "assistant", "content": "the sum of two numbers"}]}
LATE = {"messages": [{"role": "user", "content": "dog " * 40}, {"role": "assistant", "content": "yes"}]}
EOS = 2


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Return Mistral's tokenizer in small; its end token is the padding too."""
    tokenizer = CausalLMModule(tiny_mistral(tmp_path / "base")).tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pipeline(folder: Path, tokenizer: Any, *rows: Any, **settings: Any) -> DataPipeline:
    """Return the data of `rows`, objects or lines as they stand."""
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return DataPipeline(path, tokenizer, cache_dir=folder / "cache", **{"train_split": 1.0, **settings})


def labels_of(data: DataPipeline) -> list[list[int]]:
    """Return the labels of every row of an epoch, without what is ignored."""
    data.use_layout("padded", "padded")
    found = [labels for batch in data.train_loader() for labels in batch.labels]
    return [row[row != IGNORED].tolist() for row in found if (row != IGNORED).any()]


def test_a_row_of_exactly_the_longest_length(tmp_path: Path, tokenizer: Any) -> None:
    """At the limit and above it all labels are there; one token less loses exactly the last one, which is told."""
    whole = labels_of(pipeline(tmp_path, tokenizer, ROW))[0]
    length = len(pipeline(tmp_path, tokenizer, ROW).train_rows[0])
    prompt = length - len(whole)
    assert whole[-1] == EOS
    for most in (length + 1, length):
        data = pipeline(tmp_path, tokenizer, ROW, max_seq_length=most)
        assert (labels_of(data), data.summary.truncated_rows) == ([whole], 0)
    for most in range(prompt + 1, length):
        data = pipeline(tmp_path, tokenizer, ROW, max_seq_length=most)
        assert (labels_of(data), data.summary.truncated_rows) == ([whole[: most - prompt]], 1)
    with pytest.raises(DataError, match=f"has a trained token within max_seq_length={prompt}: the prompts alone are"):
        pipeline(tmp_path, tokenizer, ROW, max_seq_length=prompt)


@pytest.mark.parametrize("late", [1, 7])
def test_rows_without_a_label_are_dropped_and_counted(tmp_path: Path, tokenizer: Any, late: int) -> None:
    """However many there are beside one that can be trained; where none can, that is an error and no NaN."""
    data = pipeline(tmp_path, tokenizer, *[LATE] * late, ROW, max_seq_length=30)
    assert (data.summary.dropped_rows, len(labels_of(data))) == (late, 1)
    with pytest.raises(DataError, match="the prompts alone are longer"):
        pipeline(tmp_path, tokenizer, *[LATE] * late, max_seq_length=30)


def test_the_end_is_a_label_and_padding_is_not(tmp_path: Path, tokenizer: Any) -> None:
    """Also where the same token stands for both: as many end labels as answers, in rows of unequal length."""
    short = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = pipeline(tmp_path, tokenizer, ROW, short, batch_size=2)
    data.use_layout("padded", "padded")
    (batch,) = data.train_loader()
    assert int(np.sum(batch.labels == EOS)) == 2
    assert int(np.sum(batch.input_ids == EOS)) > 2
    assert not np.any((batch.labels != IGNORED) & (batch.attention_mask == 0))


@pytest.mark.parametrize(("lines", "error"), [([], "is empty"), (["", "  ", "\t"], "is empty")])
def test_files_without_a_row(tmp_path: Path, tokenizer: Any, lines: list[str], error: str) -> None:
    """Nothing, or blank lines alone, is an empty file."""
    with pytest.raises(DataError, match=rf"rows\.jsonl {error}"):
        pipeline(tmp_path, tokenizer, *lines)


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_rows_than_a_batch_has(tmp_path: Path, tokenizer: Any, layout: Any, rows: int) -> None:
    """One row is enough to train; the batch is as large as it is, and its loss is a number."""
    many = [{"messages": [ROW["messages"][0], {"role": "assistant", "content": f"the {n} dogs"}]} for n in range(rows)]
    data = pipeline(tmp_path, tokenizer, *many, batch_size=8, layout=layout)
    assert len(data.train_loader()) == 1
    module = CausalLMModule(tmp_path / "base", dtype="float32", max_seq_length=64)
    result = Trainer(max_steps=2, log_every=1).fit(module, data)
    assert (result.steps, result.counts["rows"]) == (2, 2 * rows)
    assert np.isfinite(result.metrics["train/loss"])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "broken JSON"),
        ("[1]", "expected a JSON object"),
        ('{"txt": "a"}', "unknown format"),
        ('{"text": 5}', "text: expected text"),
        ('{"text": "a", "text": "b"}', "duplicate key 'text'"),
        ('{"text": "\\ud83d"}', "half of a surrogate pair"),
        ('{"text": NaN}', "NaN is no JSON"),
        ('{"messages": [{"role": "judge", "content": "a"}]}', "'judge' is not one of"),
        ("\0", "broken JSON"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, tokenizer: Any, line: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Among a hundred good ones it is skipped and told by file and line; more than 5 % of such lines end the run."""
    good = [{"text": f"dog {n}"} for n in range(100)]
    data = pipeline(tmp_path, tokenizer, *good[:40], line, *good[40:])
    assert (data.summary.bad_rows, len(data.train_rows)) == (1, 100)
    assert [text for text in caplog.messages if "rows.jsonl:41: " in text and reason in text] != []
    with pytest.raises(DataError, match=rf"(?s)more than 5%.*rows\.jsonl:\d+: .*{reason[:12]}"):
        pipeline(tmp_path, tokenizer, *good[:90], *[line] * 10)


def test_a_byte_order_mark_and_nul_are_text(tmp_path: Path, tokenizer: Any) -> None:
    """The mark before the first line is passed over; a NUL within a text is trained as it stands."""
    data = pipeline(tmp_path, tokenizer, "\ufeff" + json.dumps({"text": "dog"}), {"text": "a\0b"})
    texts = [tokenizer.decode(labels, skip_special_tokens=True) for labels in labels_of(data)]
    assert sorted(texts) == ["a\0b", "dog"]
