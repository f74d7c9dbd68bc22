"""Preferences as pairs: their tokens, what becomes of long ones, and batches that keep both sides together."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data import DataError, DataPipeline, report_on
from mlx_trainer.data.batches.loader import BatchLoader
from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.pairs import encode_pairs, fit_pair, prompt_length
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.conversation import Message, Preference, RowError, Text
from tests.data.conftest import WriteRows

Sizes = Sequence[tuple[int, int, int]]
"""Words of prompt, chosen and rejected."""


def rows_of(sizes: Sizes) -> list[dict[str, str]]:
    """A preference for each, no text like another."""
    return [
        {"prompt": f"{i} " + "a " * p, "chosen": f"yes {i} " + "b " * c, "rejected": f"no {i} " + "c " * r}
        for i, (p, c, r) in enumerate(sizes)
    ]


def pipeline(path: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> DataPipeline:
    return DataPipeline(path, tokenizer, **{"pairs": True, "train_split": 1.0, "layout": "unpadded", **options})


def epoch_of(loader: BatchLoader, epoch: int) -> list[tuple[str, ...]]:
    """The rows of each batch of an epoch, of all ranks; each batch is made."""
    return [loader.batch(epoch, planned).metadata.rows for planned in loader.plan(epoch)]


@given(
    st.lists(st.tuples(*[st.integers(0, 20)] * 3), min_size=1, max_size=24),
    st.sampled_from(("padded", "unpadded")),
    st.booleans(),
    st.sampled_from(({"batch_size": 1}, {"batch_size": 3}, {"batch_tokens": 90})),
    st.integers(1, 3),
    st.integers(0, 2),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_a_pair_is_never_parted(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
    sizes: Sizes,
    layout: str,
    shuffle: bool,
    budget: dict[str, int],
    ranks: int,
    epoch: int,
) -> None:
    """Whatever the lengths, budget, order and ranks: each pair once an epoch, chosen first, rejected behind it."""
    path = tmp_path_factory.mktemp("rows") / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(sizes)))
    data = pipeline(path, tokenizer, layout=layout, shuffle=shuffle, **budget)
    batches = epoch_of(data.train_loader(ranks=ranks), epoch)
    for rows in batches:
        assert [row.rpartition(" ")[2] for row in rows] == ["chosen", "rejected"] * (len(rows) // 2)
        assert [row.rpartition(" ")[0] for row in rows[::2]] == [row.rpartition(" ")[0] for row in rows[1::2]]
        assert len(rows) <= 2 * budget.get("batch_size", len(sizes))
    places = [row.rpartition(" ")[0] for rows in batches for row in rows[::2]]
    expected = [f"prefs.jsonl:{i + 1}" for i in range(len(sizes))]
    assert sorted(places) == sorted(expected) if shuffle else places == expected
    assert len(batches) % ranks == 0


def test_prompts_are_computed_once(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    """Long prompts with short answers, as in most data: most of each prompt is shared, and the report says how much."""
    random = np.random.default_rng(0)
    sizes = [tuple(row) for row in random.integers((20, 1, 1), (90, 9, 9), (200, 3)).tolist()]
    data = pipeline(write_rows(rows_of(sizes)), tokenizer, batch_size=4)
    report, loader = report_on(data), data.train_loader()
    prompts = sum(int(row.trained.argmax()) for row in data.train_rows[::2])
    assert 0.75 * prompts < report.shared_tokens < prompts
    assert sum(batch.metadata.shared_tokens for batch in loader) == report.shared_tokens
    assert report.shapes <= 16
    assert f"{report.shared_tokens / report.epoch_tokens:.1%} of the tokens stand in prefixes" in "\n".join(
        report.lines()
    )
    assert report_on(pipeline(write_rows(rows_of(sizes)), tokenizer, layout="padded")).shared_tokens == 0


def test_weights_count_pairs(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    """A source of weight 2 has each pair twice an epoch; of one of weight 0.5 the pairs take turns."""
    twice = write_rows(rows_of([(i, 1 + i % 3, 2) for i in range(6)]), "twice.jsonl")
    half = write_rows(rows_of([(9 * i, 1, 7 - i % 5) for i in range(7)]), "half.jsonl")
    loader = pipeline({twice: 2, half: 0.5}, tokenizer, batch_size=3).train_loader()
    counts = [Counter(row for rows in epoch_of(loader, epoch) for row in rows) for epoch in range(4)]
    for count in counts:
        assert all(count[f"twice.jsonl:{i} {side}"] == 2 for i in range(1, 7) for side in ("chosen", "rejected"))
        assert sum(count.values()) == 2 * (12 + 4)
    assert all(sum(counts, Counter())[f"half.jsonl:{i} chosen"] for i in range(1, 8))


def test_the_position_is_two_integers(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    """A loader continues with the batches that another, interrupted one would have made."""
    path = write_rows(rows_of([(i % 11, i % 5, i % 7) for i in range(30)]))
    first, second = (pipeline(path, tokenizer, batch_size=4).train_loader() for _ in range(2))
    rows = [batch.metadata.rows for _ in range(2) for batch in first]
    assert first.state_dict() == {"epoch": 2, "position": 0}
    second.load_state_dict({"epoch": 1, "position": 3})
    assert [batch.metadata.rows for batch in second] == rows[len(first) + 3 :]


def test_splits_keep_pairs_together(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    """Held-out pairs are whole, come alike every time, and are counted as rows of the file."""
    path = write_rows(rows_of([(i, 3, 5) for i in range(20)]))
    data = pipeline(path, tokenizer, train_split=0.75, batch_size=2)
    assert (data.summary.rows, data.summary.train_rows, data.summary.validation_rows) == (20, 15, 5)
    loader = data.validation_loader()
    assert loader is not None
    once, again = ([batch.metadata.rows for batch in loader] for _ in range(2))
    held_out = {row.rpartition(" ")[0] for rows in once for row in rows}
    assert once == again
    assert len(held_out) == 5
    assert held_out.isdisjoint(row.source.rpartition(" ")[0] for row in data.train_rows)


def test_the_summary_tells_the_length_of_both_sides(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    """DPO likes longer answers where the chosen ones are longer, so both means are told; repeats are those of pairs."""
    rows = rows_of([(3, 8, 2), (5, 6, 4), (1, 9, 0)])
    other = {**rows[0], "rejected": "nothing"}
    data = pipeline(write_rows([*rows, other, rows[1]]), tokenizer)
    sides = [[row.trained_tokens for row in data.train_rows[side::2]] for side in (0, 1)]
    assert (data.summary.chosen_tokens, data.summary.rejected_tokens) == (sum(sides[0]), sum(sides[1]))
    means = [f"{sum(side) / 5:.1f}" for side in sides]
    assert f"chosen answers have {means[0]} tokens on average, rejected ones {means[1]}" in str(data.summary)
    assert data.summary.duplicate_rows == 1
    assert data.summary.trained_tokens == sum(sides[0]) + sum(sides[1])


def encoded(tokenizer: PreTrainedTokenizerFast, preference: Preference) -> tuple[Tokens, Tokens]:
    (pair,) = encode_pairs([preference], SampleEncoder.of(tokenizer))
    assert not isinstance(pair, RowError)
    return pair


def turn(content: str, role: str = "assistant", weight: int = 1) -> Message:
    return Message(role, content, weight)  # type: ignore[arg-type]


def test_both_sides_have_the_prompt_of_mistral(tokenizer: PreTrainedTokenizerFast) -> None:
    """`<s>[INST] …[/INST]` with earlier turns and the system text is the same on both; only the last answer trains."""
    prompt = (turn("Be kind.", "system", 0), turn("2+2?", "user", 0), turn("4", weight=0), turn("Sure?", "user", 0))
    chosen, rejected = encoded(tokenizer, Preference(prompt, (turn("Yes."),), (turn("I  think so"),)))
    asked = prompt_length(chosen, rejected)
    assert chosen.ids[:asked].tolist() == rejected.ids[:asked].tolist()
    assert tokenizer.decode(chosen.ids[:asked]) == "<s>[INST] 2+2?[/INST] 4</s>[INST] Be kind.\n\nSure?[/INST]"
    assert [tokenizer.decode(side.ids[side.trained]) for side in (chosen, rejected)] == [
        " Yes.</s>",
        " I  think so</s>",
    ]
    assert not chosen.trained[:asked].any()
    assert chosen.trained[asked:].all()


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (Text("plain"), "a pair needs chosen and rejected"),
        (
            Preference((turn("a", "user", 0),), (turn("b"),), (turn("b  "),)),
            "chosen, rejected: the same tokens, so neither can be preferred",
        ),
        (
            # Mistral writes the system text before the last question, which only one side has.
            Preference(
                (turn("Be kind.", "system", 0), turn("a", "user", 0)),
                (turn("b"), turn("why?", "user"), turn("c")),
                (turn("d"),),
            ),
            "chosen, rejected: what follows the prompt changes how it is written",
        ),
    ],
)
def test_what_is_no_pair_is_refused(tokenizer: PreTrainedTokenizerFast, row: Any, error: str) -> None:
    """With the reason; the rows beside it are encoded."""
    good = Preference((turn("a", "user", 0),), (turn("b"),), (turn("c"),))
    first, refused, last = encode_pairs([good, row, good], SampleEncoder.of(tokenizer))
    assert isinstance(refused, RowError)
    assert str(refused).startswith(error)
    assert not isinstance(first, RowError)
    assert not isinstance(last, RowError)


def test_bad_rows_are_told_as_others_are(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, caplog: pytest.LogCaptureFixture
) -> None:
    """With file, line and reason; too many are an error, and without `pairs` every preference is a bad row."""
    rows = [*rows_of([(1, 2, 3)] * 3), {"prompt": "a", "completion": "b"}]
    path = write_rows(rows)
    with caplog.at_level(logging.WARNING):
        data = pipeline(path, tokenizer, max_bad_share=0.3)
    assert (data.summary.bad_rows, len(data.train_rows)) == (1, 6)
    assert "chats.jsonl:4: a pair needs chosen and rejected" in caplog.text
    with pytest.raises(DataError, match="1 of 4 rows cannot be used"):
        pipeline(path, tokenizer)
    with pytest.raises(DataError, match=r"training\.method dpo or orpo \(DataPipeline: pairs=True\)"):
        pipeline(path, tokenizer, pairs=False)


@given(st.integers(2, 30), st.integers(1, 9), st.integers(1, 9), st.integers(1, 30), st.booleans())
def test_the_prompt_is_cut_at_its_beginning(prompt: int, chosen: int, rejected: int, over: int, bos: bool) -> None:
    """Both sides lose the same tokens of the prompt and none of the answer; BOS stays; else the pair is dropped."""
    asked = np.arange(100, 100 + prompt)
    pair = tuple(
        Tokens.of(np.concatenate([asked, np.arange(n)]), np.arange(prompt + n) >= prompt) for n in (chosen, rejected)
    )
    most = prompt + max(chosen, rejected) - over
    cut = fit_pair(pair, most, "truncate", 100 if bos else None)  # type: ignore[arg-type]
    if over >= prompt - bos:
        assert cut is None
        return
    assert cut is not None
    kept = asked[over:] if not bos else np.concatenate([asked[:1], asked[1 + over :]])
    for side, answer in zip(cut, (chosen, rejected), strict=True):
        assert side.ids.tolist() == [*kept.tolist(), *range(answer)]
        assert side.trained.tolist() == [False] * len(kept) + [True] * answer
    assert max(len(side.ids) for side in cut) == most


@pytest.mark.parametrize(("truncation", "kept", "kind"), [("truncate", 4, "truncated"), ("drop", 2, "dropped")])
def test_long_pairs(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, truncation: str, kept: int, kind: str
) -> None:
    """A pair that is too long is cut or dropped as a whole, and one whose answer alone is too long is dropped."""
    rows = rows_of([(2, 3, 4), (60, 3, 4), (2, 3, 70)])
    data = pipeline(write_rows(rows), tokenizer, max_seq_length=40, truncation=truncation)
    assert len(data.train_rows) == kept
    assert data.summary.truncated_rows == (kind == "truncated")
    assert data.summary.dropped_rows == 2 - (kind == "truncated")
    assert max(map(len, data.train_rows)) <= 40
    with pytest.raises(DataError, match="2 rows are longer than max_seq_length=40"):
        pipeline(write_rows(rows), tokenizer, max_seq_length=40, truncation="error")


def test_the_store_is_another_than_that_of_rows(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    """The same file read as rows and as pairs has two stores."""
    path = write_rows([*rows_of([(1, 2, 3)] * 19), {"text": "a text"}])
    for pairs, rows in ((True, 38), (False, 1)):
        data = pipeline(path, tokenizer, pairs=pairs, max_bad_share=1.0, cache_dir=tmp_path)
        assert len(data.train_rows) == rows
