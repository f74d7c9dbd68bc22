"""The whole way from a file to batches."""

import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data import IGNORED, BatchLoader, DataError, DataPipeline
from tests.data.conftest import WriteRows
from tests.strategies import conversations


def chat(number: int, words: int = 1) -> dict[str, Any]:
    """A row whose answer is `words` times its number."""
    return {
        "messages": [
            {"role": "user", "content": f"say {number}"},
            {"role": "assistant", "content": " ".join([str(number)] * words)},
        ]
    }


CHATS = [chat(number, 1 + 5 * number % 17) for number in range(40)]


def sources(loader: BatchLoader | None) -> list[str]:
    """Sources of all rows of one iteration."""
    return [source for batch in loader or () for source in batch.metadata.rows]


def test_batches_of_a_file(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Every row of a file of three formats is in one batch, and what is trained reads as the answers."""
    mixed = [*CHATS[:8], {"prompt": "hello", "completion": "world"}, {"text": "plain"}]
    pipeline = DataPipeline(write_rows(mixed), tokenizer, train_split=1.0, batch_size=3)
    trained: dict[str, str] = {}
    for batch in pipeline.train_loader():
        for source, labels in zip(batch.metadata.rows, batch.labels, strict=False):
            trained[source] = str(tokenizer.decode(labels[labels != IGNORED]))
    answers = [f" {row['messages'][1]['content']}</s>" for row in CHATS[:8]]
    assert trained == {f"chats.jsonl:{i + 1}": text for i, text in enumerate([*answers, " world</s>", "plain</s>"])}
    assert pipeline.validation_loader() is None


def test_split_and_summary(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenth is held out; the summary counts what the loaders give, and is logged."""
    caplog.set_level(logging.INFO)
    pipeline = DataPipeline(write_rows(CHATS), tokenizer, batch_size=4)
    train, validation = pipeline.train_loader(), pipeline.validation_loader()
    assert validation is not None
    assert sorted(sources(train) + sources(validation)) == sorted(f"chats.jsonl:{i + 1}" for i in range(40))
    summary = pipeline.summary
    assert (summary.rows, summary.train_rows, summary.validation_rows) == (40, 36, 4)
    batches = [*pipeline.train_loader(), *validation]
    assert summary.tokens == sum(int(batch.attention_mask.sum()) for batch in batches)
    assert summary.trained_tokens == sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
    lengths = sorted(int(mask.sum()) for batch in batches for mask in batch.attention_mask)
    assert (summary.length_p50, summary.length_max) == (lengths[19], lengths[-1])
    assert "40 rows (0 bad, 0 dropped, 0 truncated): 36 to train on, 4 held out" in caplog.text
    assert "chats.jsonl: 40 messages rows" in caplog.text


def test_validation_file(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """A second file is held out whole, sorted by length, and the first is trained whole."""
    held_out = write_rows([chat(1, 9), chat(2, 3), chat(3, 6)], "held.jsonl")
    pipeline = DataPipeline(write_rows(CHATS[:5]), tokenizer, validation_path=held_out, train_split=0.5)
    assert sorted(sources(pipeline.train_loader())) == [f"chats.jsonl:{i + 1}" for i in range(5)]
    assert sources(pipeline.validation_loader()) == ["held.jsonl:2", "held.jsonl:3", "held.jsonl:1"]


def test_duplicates_and_leaks(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of the same ids and mask are counted on their side; held-out rows that are trained too raise a warning."""
    caplog.set_level(logging.INFO)
    untrained = [{**message, "weight": 0} for message in chat(1)["messages"]]
    other_mask = {"messages": [*untrained, *chat(2)["messages"]]}
    same_ids = {"messages": [*chat(1)["messages"], *chat(2)["messages"]]}
    train = [chat(1), chat(2), {"prompt": "say 1", "completion": "1"}, chat(1), other_mask, same_ids]
    held_out = write_rows([chat(3), chat(3), chat(1), chat(2), other_mask], "held.jsonl")
    pipeline = DataPipeline(write_rows(train), tokenizer, validation_path=held_out)
    assert (pipeline.summary.duplicate_rows, pipeline.summary.leaked_rows) == (3, 3)
    assert (pipeline.summary.train_rows, pipeline.summary.validation_rows) == (6, 5)
    assert "3 duplicates; 3 of the rows held out are trained too" in caplog.text
    assert "3 of 5 held-out rows are trained too, first held.jsonl:3, which is the same as chats.jsonl:1" in caplog.text


def test_distinct_rows_are_no_duplicates(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Where all rows are distinct, the counts are zero and nothing is told of them."""
    caplog.set_level(logging.INFO)
    summary = DataPipeline(write_rows(CHATS), tokenizer).summary
    assert (summary.duplicate_rows, summary.leaked_rows) == (0, 0)
    assert "duplicates" not in caplog.text
    assert "trained too" not in caplog.text


def test_few_bad_rows_are_skipped(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to 5 % bad rows are left out, each told with file and line."""
    rows = [*CHATS[:20], b"{", *CHATS[20:38], {"messages": [{"role": "human", "content": "x"}]}]
    pipeline = DataPipeline(write_rows(rows), tokenizer)
    assert (pipeline.summary.rows, pipeline.summary.bad_rows) == (40, 2)
    assert pipeline.summary.train_rows + pipeline.summary.validation_rows == 38
    assert "chats.jsonl:21: broken JSON at column 2" in caplog.text
    assert "chats.jsonl:40: messages[0].role: 'human' is not one of system, user, assistant" in caplog.text


def test_many_bad_rows_raise(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """More than 5 % bad rows raise with the first ten and the number of the others; a file of nothing else does too."""
    with pytest.raises(DataError) as raised:
        DataPipeline(write_rows([*CHATS, *[{"text": i} for i in range(12)]]), tokenizer)
    assert "12 of 52 rows cannot be used, more than 5%" in str(raised.value)
    assert "chats.jsonl:50: text: expected text, got a number\n  and 2 more" in str(raised.value)
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        DataPipeline(write_rows([{"question": "?"}]), tokenizer)


def test_many_warnings_become_a_count(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond ten, skipped rows are told as a count."""
    DataPipeline(write_rows([{"text": ""}] * 12 + CHATS * 6), tokenizer)
    assert len([record for record in caplog.records if "text: empty" in record.message]) == 10
    assert "skipped a bad row: and 2 more, 12 in all" in caplog.text


def test_truncation_is_never_silent(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Long rows lose their tail; one that loses every label is dropped, counted and named."""
    long_prompt = {"prompt": "hello " * 30, "completion": "world"}
    pipeline = DataPipeline(
        write_rows([chat(1), chat(2, 90), long_prompt]), tokenizer, max_seq_length=40, train_split=1.0
    )
    summary = pipeline.summary
    assert (summary.rows, summary.train_rows, summary.truncated_rows, summary.dropped_rows) == (3, 2, 1, 1)
    assert summary.length_max > 40
    assert sorted(sources(pipeline.train_loader())) == ["chats.jsonl:1", "chats.jsonl:2"]
    (batch,) = pipeline.train_loader()
    assert batch.input_ids.shape == (2, 40)
    assert "dropped a row with no trained token within max_seq_length=40: chats.jsonl:3" in caplog.text


def test_nothing_left_after_truncation(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Where all rows lose all labels, the pipeline raises and names the setting and the length it takes."""
    with pytest.raises(DataError, match=r"within max_seq_length=4: .* Raise max_seq_length .the longest row has"):
        DataPipeline(write_rows(CHATS), tokenizer, max_seq_length=4)


def test_written_out_templates_are_told(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """Text rows that spell control tokens stay text, and a warning says so."""
    DataPipeline(write_rows([{"text": "plain"}, {"text": "<s>[INST] hi[/INST]"}]), tokenizer)
    assert "chats.jsonl: 1 text rows spell control tokens, first chats.jsonl:2 with <s>" in caplog.text


def test_ids_beyond_the_vocabulary(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """An id that the model does not have is refused with its row and token."""
    path = write_rows(CHATS)
    largest = max(int(batch.input_ids.max()) for batch in DataPipeline(path, tokenizer, train_split=1.0).train_loader())
    DataPipeline(path, tokenizer, vocabulary_size=largest + 1)
    with pytest.raises(DataError, match=f"has id {largest}, but the model's vocabulary ends at {largest - 1}"):
        DataPipeline(path, tokenizer, vocabulary_size=largest)
    with pytest.raises(
        DataError, match=r"chats.jsonl:1: token '.+' has id \d+, but the model's vocabulary ends at 4\."
    ):
        DataPipeline(path, tokenizer, vocabulary_size=5)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("max_seq_length", 1),
        ("train_split", 0.0),
        ("train_split", 1.5),
        ("seed", -1),
        ("num_workers", -1),
        ("completion_style", "alpaca"),
    ],
)
def test_settings_out_of_range(
    write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast, setting: str, value: Any
) -> None:
    """A setting out of its range is refused by name, with its value and range."""
    with pytest.raises(DataError, match=f"{setting} is {value!r}. It must be "):
        DataPipeline(write_rows(CHATS), tokenizer, **{setting: value})


def test_settings_reach_the_loaders(write_rows: WriteRows, tokenizer: PreTrainedTokenizerFast) -> None:
    """Seed, shuffle, workers and completion style each change what the option says, and nothing else."""
    path = write_rows(CHATS)
    variants: tuple[dict[str, Any], ...] = ({}, {"num_workers": 2}, {"seed": 43}, {"shuffle": False})
    orders = [sources(DataPipeline(path, tokenizer, train_split=1.0, **options).train_loader()) for options in variants]
    assert orders[0] == orders[1] != orders[2]
    assert orders[3] == [f"chats.jsonl:{i + 1}" for i in range(40)]
    raw = DataPipeline(
        write_rows([{"prompt": "hello", "completion": " world"}]), tokenizer, completion_style="raw", train_split=1.0
    )
    (batch,) = raw.train_loader()
    assert tokenizer.decode(batch.input_ids[batch.attention_mask == 1]) == "<s>hello world</s>"


@given(st.lists(conversations(max_turns=3, weights=True), min_size=1, max_size=6), st.integers(2, 80))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_only_answers_are_ever_labels(
    tmp_path: Path,
    write_rows: WriteRows,
    tokenizer: PreTrainedTokenizerFast,
    chats: list[list[dict[str, Any]]],
    max_seq_length: int,
) -> None:
    """For any conversations: labels lie between `[/INST]` and `</s>`, equal their ids, and every row used has one."""
    path = write_rows([{"messages": messages} for messages in chats])
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("[INST]", "[/INST]"))
    try:
        pipeline = DataPipeline(path, tokenizer, max_seq_length=max_seq_length, train_split=1.0)
    except DataError as error:
        if "No row of" not in str(error):
            raise
        return
    for batch in pipeline.train_loader():
        labelled = batch.labels != IGNORED
        assert (batch.labels[labelled] == batch.input_ids[labelled]).all()
        assert not labelled[batch.attention_mask == 0].any()
        assert labelled[: len(batch.metadata.rows), 1:].any(axis=1).all()
        assert not labelled[len(batch.metadata.rows) :].any()
        for ids, labels in zip(batch.input_ids.tolist(), labelled.tolist(), strict=True):
            answering = False
            for id, label in zip(ids, labels, strict=True):
                assert answering or not label
                answering = (answering or id == end) and id not in (begin, tokenizer.eos_token_id)
