"""The report: exact figures of a small file, and rows whose marks are the labels."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from attrs import asdict, evolve
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data import IGNORED, DataPipeline, DataReport, collate, render, report_on, show, warnings_of
from mlx_trainer.data.batches.loader import BatchLayout
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.example import Example, Span
from mlx_trainer.data.report import UsedShape
from mlx_trainer.data.store.store import TokenRow
from tests.data.conftest import WriteRows
from tests.data.tokenizers_for_tests import mistral_tokenizer
from tests.tiny import write_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
LONG_CHAT = {
    "messages": [
        SYSTEM,
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "The fox.\n  A quick one: žluťoučký ⛄"},
        {"role": "user", "content": "Why </s>?"},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": " [x] "},
        {"role": "assistant", "content": "So."},
    ]
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def dogs(count: int) -> dict[str, Any]:
    """A chat of `count` + 12 tokens, the last 8 of them trained."""
    return {"prompt": "dog " * count, "completion": f"the sum is {count % 10}"}


@pytest.fixture
def report(write_rows: WriteRows, tiny: PreTrainedTokenizerFast) -> DataReport:
    """The report of chats of 13, 32, 48, 87 and 14 tokens, cut at 44, in batches of two in the file's order.

    There are too few rows for a class of short ones, so all are padded to 48.
    """
    path = write_rows([dogs(1), dogs(20), dogs(36), {"prompt": "dog " * 80, "completion": "!"}, dogs(2)])
    pipeline = DataPipeline(path, tiny, max_seq_length=44, train_split=1.0, shuffle=False)
    examples = [render(row, tiny) for row in pipeline.train_rows[:1]]
    return report_on(pipeline, accumulate=3, epochs=4, max_steps=3, examples=examples)


def test_figures_of_a_small_file(report: DataReport) -> None:
    """Every figure as counted by hand, beside any other of the summary; `as_dict` has warnings and rows too."""
    expected = asdict(report.summary) | {
        "rows": 5,
        "bad_rows": 0,
        "truncated_rows": 1,
        "split_rows": 0,
        "dropped_rows": 1,
        "train_rows": 4,
        "validation_rows": 0,
        "tokens": 13 + 32 + 44 + 14,
        "trained_tokens": 8 + 8 + (8 - 4) + 8,
        "length_p50": 32,
        "length_p95": 87,
        "length_max": 87,
        "trained_share": 28 / 103,
        "batches": 2,
        "layout": "padded",
        "shapes": 1,
        "used_shapes": [{"rows": 2, "length": 48, "positions": 96, "batches": 2, "prefix": 0}],
        "padding_share": 1 - 103 / (4 * 48),
        "positions_per_token": 4 * 48 / 103,
        "shared_tokens": 0,
        "steps_per_epoch": 1,
        "total_steps": 3,
    }
    assert report.figures() == expected
    assert {key: value for key, value in report.as_dict().items() if key not in ("warnings", "examples")} == expected


def test_lines(report: DataReport) -> None:
    """The same figures for people; the last four are what the summary has not."""
    assert report.lines() == [
        *str(report.summary).splitlines(),
        "27.2% of the tokens are trained",
        "batches per epoch: 2; 46.4% padding, 1.86 positions computed per token",
        "1 shape, compiled once: 2×48 rows×tokens",
        "optimizer steps: 1 per epoch, 3 in all",
    ]
    assert report.lines()[-4:] == report.epoch_lines()


@pytest.mark.parametrize(
    ("count", "line"),
    [
        (2, "2 shapes, each compiled once: 4×8, 4×16 rows×tokens"),
        (
            17,
            "17 shapes, each compiled once: 4×8, 4×16, 4×24, 4×32, 4×40, 4×48, 4×56, 4×64, …, "
            "4×80, 4×88, 4×96, 4×104, 4×112, 4×120, 4×128, 4×136 rows×tokens",
        ),
    ],
)
def test_shapes_are_told_in_a_line(count: int, line: str, report: DataReport) -> None:
    """All of up to 16, else the shortest and the longest ones; the figures have them all."""
    shapes = tuple(UsedShape(4, 8 * n, 32 * n, n) for n in range(1, count + 1))
    many = evolve(report, shapes=count, used_shapes=shapes)
    assert many.epoch_lines()[2] == line
    assert many.figures()["used_shapes"] == [asdict(shape) for shape in shapes]


def test_as_dict_is_json(report: DataReport) -> None:
    """Written as JSON and read again, it is the same; warnings and rows are part of it."""
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert report.as_dict()["warnings"] == warnings_of(report)
    assert report.as_dict()["examples"] == [
        {
            "source": "chats.jsonl:1",
            "spans": [
                {"text": "<s>[INST] dog [/INST]", "trained": False},
                {"text": " the sum is 1</s>", "trained": True},
            ],
        }
    ]


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
def test_figures_are_those_of_the_batches(
    layout: BatchLayout, write_rows: WriteRows, tiny: PreTrainedTokenizerFast
) -> None:
    """What is computed from lengths and plan equals what the batches of epoch 0 hold, at any batch size."""
    path = write_rows([dogs(7 * n % 60 + 1) for n in range(23)])
    for batch_size in (1, 3, 4, 30):
        pipeline = DataPipeline(path, tiny, batch_size=batch_size, max_seq_length=60, train_split=0.9, layout=layout)
        report, batches = report_on(pipeline, accumulate=2, epochs=2), list(pipeline.train_loader())
        assert report.batches == len(batches)
        shapes = Counter((batch.input_ids if layout == "padded" else batch.grid).shape for batch in batches)
        assert {(shape.rows, shape.length): shape.batches for shape in report.used_shapes} == shapes
        assert len(shapes) <= report.shapes <= (1 if layout == "padded" else 2) * len(shapes)
        assert report.epoch_positions == sum(batch.input_ids.size for batch in batches)
        assert report.epoch_tokens == sum(batch.metadata.tokens for batch in batches)
        assert (report.steps_per_epoch, report.total_steps) == (-(-len(batches) // 2), 2 * -(-len(batches) // 2))


def test_a_row_is_shown_as_it_is_trained(write_rows: WriteRows, tiny: PreTrainedTokenizerFast) -> None:
    """Each answer with its end is marked, no prompt and no answer of weight 0 is; blanks and letters stay."""
    (row,) = DataPipeline(write_rows([LONG_CHAT]), tiny, train_split=1.0).train_rows
    example = render(row, tiny)
    assert example.source == "chats.jsonl:1"
    assert example.plain() == (
        "<s>[INST] Who?[/INST]⟦ The fox.\n  A quick one: žluťoučký ⛄</s>⟧[INST] Why </s>?[/INST] No.</s>"
        "[INST] Be brief.\n\n [x] [/INST]⟦ So.</s>⟧"
    )


@pytest.mark.parametrize("kind", ["tiny", "SentencePiece", "SentencePiece that always adds a blank"])
def test_trained_text_is_the_labels(kind: str, write_rows: WriteRows, tiny: PreTrainedTokenizerFast) -> None:
    """With every family of tokenizers the spans joined are the decoded row, and the trained ones are the labels."""
    tokenizer = tiny if kind == "tiny" else mistral_tokenizer(always_prepend=kind != "SentencePiece")
    path = write_rows([LONG_CHAT, dogs(3), {"text": "plain text"}])
    for row in DataPipeline(path, tokenizer, train_split=1.0).train_rows:
        spans = render(row, tokenizer).spans
        assert "".join(span.text for span in spans) == tokenizer.decode(row.ids)
        assert all(a.trained != b.trained for a, b in pairwise(spans))
        labels = collate([row], Shape(1, len(row), len(row))).labels
        assert "".join(span.text for span in spans if span.trained) == tokenizer.decode(labels[labels != IGNORED])


def test_no_blank_is_lost_between_spans() -> None:
    """A decoder that strips the first blank of what it decodes, as SentencePiece's does, strips it once a row."""

    class Stripping:
        def decode(self, token_ids: list[int], *, clean_up_tokenization_spaces: bool) -> str:
            return "".join(" abcd"[id] for id in token_ids).removeprefix(" ")

    ids, trained = np.array([0, 1, 0, 2, 0, 3], np.int32), np.array([0, 0, 1, 1, 0, 0], np.bool_)
    row = TokenRow("x.jsonl:1", ids=ids, trained=trained)
    assert render(row, Stripping()).plain() == "a⟦ b⟧ c"


def test_control_characters_are_shown_and_not_obeyed() -> None:
    """A row cannot recolour or overwrite the terminal; line ends and tabs stay, and JSON has the text as it is."""
    example = Example("x.jsonl:1", (Span("a\r\n\tb\u202e", False), Span("\x1b[2J\x9b [b]c", True)))
    assert example.plain() == "a\\r\n\tb\\u202e⟦\\x1b[2J\\x9b [b]c⟧"
    assert example.coloured().plain == "a\\r\n\tb\\u202e\\x1b[2J\\x9b [b]c"


ROW = Example("x.jsonl:1", (Span("abc", False), Span("defgh", True), Span("ij", False)))


def test_a_long_row_is_shown_by_its_ends() -> None:
    """As many characters as are asked for stay, each marked as before; a remark says how many do not."""
    assert ROW.shortened(10) is ROW
    assert ROW.shortened(9).plain() == "abc⟦de⟧ [… 1 character left out …] ⟦gh⟧ij"
    for most in range(10):
        spans = ROW.shortened(most).spans
        (remark,) = (span for span in spans if span.trained is None)
        texts = [span.text for span in spans if span.trained is not None]
        assert (sum(map(len, texts)), f"… {10 - most} character" in remark.text) == (most, True)
        assert all(texts)


def test_every_text_of_a_row_can_be_changed() -> None:
    """Access tokens can be hidden; what is trained stays the same."""
    assert ROW.changed(str.upper).plain() == "ABC⟦DEFGH⟧IJ"


SUMMARY_WARNINGS = {
    "bad_rows": "2 of 5 rows cannot be used; repair them",
    "truncated_rows": "2 of 5 rows were cut at the maximum length; "
    "raise model.max_seq_length (the longest row has 87 tokens) or shorten them",
    "dropped_rows": "2 of 5 rows were dropped for their length; "
    "raise model.max_seq_length (the longest row has 87 tokens) or shorten them",
    "duplicate_rows": "2 of 5 rows repeat an earlier one and weigh as much again; drop them unless that is meant",
    "leaked_rows": "2 of 3 rows held out are trained too, so that the held-out loss is too low; "
    "keep each row on one side",
}


@pytest.fixture
def clean(report: DataReport) -> DataReport:
    """The report as if nothing were cut or dropped, each limit just not passed."""
    summary = evolve(
        report.summary, truncated_rows=0, dropped_rows=0, validation_rows=3, tokens=1000, trained_tokens=10
    )
    return evolve(report, summary=summary, shapes=16, epoch_tokens=75, epoch_positions=100)


@pytest.mark.parametrize("name", SUMMARY_WARNINGS)
def test_each_kind_of_row_is_warned_of(name: str, clean: DataReport) -> None:
    """Bad, cut, dropped, repeated and leaked rows each have their sentence."""
    assert warnings_of(clean) == []
    assert warnings_of(evolve(clean, summary=evolve(clean.summary, **{name: 2}))) == [SUMMARY_WARNINGS[name]]


def test_each_limit_is_warned_of(clean: DataReport) -> None:
    """More than 25 % padding and less than 1 % trained tokens each have their sentence; many shapes were asked for."""
    assert warnings_of(evolve(clean, shapes=100)) == []
    assert warnings_of(evolve(clean, epoch_tokens=74)) == [
        "26.0% of the positions are padding, more than 25%; "
        "each row is padded to the next of few lengths: smaller batches give less, and where all data.max_shapes "
        "shapes are in use, more of them"
    ]
    assert warnings_of(evolve(clean, summary=evolve(clean.summary, trained_tokens=9))) == [
        "0.9% of the tokens are trained, less than 1%; shorten the prompts, or give longer answers"
    ]


def shown(report: DataReport, capsys: pytest.CaptureFixture[str]) -> str:
    """What `show` prints."""
    show(report)
    return capsys.readouterr().out


def test_without_a_terminal_marks_are_characters(
    report: DataReport, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, then warnings, then the rows with trained text between markers; so too on a terminal with NO_COLOR."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    expected = "\n".join(
        [
            *report.lines(),
            *(f"warning: {sentence}" for sentence in warnings_of(report)),
            "\nchats.jsonl:1, trained between ⟦ and ⟧:",
            "<s>[INST] dog [/INST]⟦ the sum is 1</s>⟧\n",
        ]
    )
    assert shown(report, capsys) == expected
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(report, capsys) == expected


def test_on_a_terminal_trained_text_is_green(
    report: DataReport, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is coloured or added, however narrow the terminal is."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "10")
    expected = "\nchats.jsonl:1, trained in green:\n<s>[INST] dog [/INST]\x1b[32m the sum is 1</s>\x1b[0m\n"
    assert shown(report, capsys).endswith(expected)
