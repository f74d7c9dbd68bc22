"""Rows longer than the maximum."""

from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.encoding.truncation import TRUNCATIONS, fit, split_text
from mlx_trainer.data.samples.conversation import Conversation, Text
from mlx_trainer.data.samples.formats import FORMATS
from tests.data.tokenizers_for_tests import byte_level_mistral
from tests.strategies import conversations


def encoded(encoder: SampleEncoder, sample: Any) -> Tokens:
    """The tokens of one sample."""
    (tokens,) = encoder.encode([sample])
    assert isinstance(tokens, Tokens)
    return tokens


def chat(*answers: str, system: str | None = None) -> Conversation:
    """A conversation of numbered questions with these answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, answer in enumerate(answers):
        messages += [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": answer}]
    sample = FORMATS["messages"].parse({"messages": messages})
    assert isinstance(sample, Conversation)
    return sample


def test_whole_turns_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    """A chat loses its last turns and not half a turn; the system text then stands before the last question left."""
    encoder = SampleEncoder.of(tokenizer)
    sample = chat("one two three", "four", "five " * 30, system="Be brief.")
    tokens = encoded(encoder, sample)
    two = encoded(encoder, chat("one two three", "four", system="Be brief."))
    for most in (len(two.ids), len(two.ids) + 5, len(tokens.ids) - 1):
        (kept,) = fit(sample, tokens, encoder, most, "truncate")
        assert kept.ids.tolist() == two.ids.tolist()
        assert kept.trained.tolist() == two.trained.tolist()
    (one,) = fit(sample, tokens, encoder, len(two.ids) - 1, "truncate")
    assert tokenizer.decode(one.ids) == "<s>[INST] Be brief.\n\nquestion 0[/INST] one two three</s>"


def test_a_single_turn_loses_its_tail(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where not even the first turn fits, its beginning is kept with its system text; nothing where none is trained."""
    encoder = SampleEncoder.of(tokenizer)
    sample = chat("one " * 20, "four", system="Be brief.")
    first = encoded(encoder, chat("one " * 20, system="Be brief."))
    prompt = int(np.flatnonzero(first.trained)[0])
    tokens = encoded(encoder, sample)
    (kept,) = fit(sample, tokens, encoder, prompt + 3, "truncate")
    assert kept.ids.tolist() == first.ids[: prompt + 3].tolist()
    assert kept.trained.sum() == 3
    assert fit(sample, tokens, encoder, prompt, "truncate") == []


@given(st.integers(2, 9), st.integers(2, 60))
def test_split_trains_each_token_once(most: int, length: int) -> None:
    """Parts fit, overlap by one untrained token, and train every token but the first once, in order."""
    tokens = Tokens.of(list(range(length)), [False] + [True] * (length - 1))
    parts = split_text(tokens, most)
    assert all(len(part.ids) <= most and not part.trained[0] for part in parts)
    assert [id for part in parts for id in part.ids[part.trained].tolist()] == list(range(1, length))
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(parts))


def test_each_policy_does_what_it_says(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a long text: its beginning, several rows, nothing, nothing (and an error later); a chat is never split."""
    encoder = SampleEncoder.of(tokenizer)
    text = Text("hello world " * 20)
    tokens = encoded(encoder, text)
    kept = {policy: fit(text, tokens, encoder, 16, policy) for policy in TRUNCATIONS}
    assert [len(kept[policy]) for policy in ("truncate", "drop", "error")] == [1, 0, 0]
    assert kept["truncate"][0].ids.tolist() == tokens.ids[:16].tolist()
    assert len(kept["split"]) == -(-(len(tokens.ids) - 1) // 15)
    sample = chat("one", "two " * 30)
    long = encoded(encoder, sample)
    both = [fit(sample, long, encoder, 20, policy) for policy in ("truncate", "split")]
    assert [row.ids.tolist() for row in both[0]] == [row.ids.tolist() for row in both[1]]


@given(conversations(weights=True), st.integers(2, 80))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_what_is_kept_is_the_beginning_of_a_chat(messages: list[dict[str, Any]], most: int) -> None:
    """Whatever is cut: it fits, something is trained, and trained is a beginning of what was trained."""
    encoder = SampleEncoder.of(byte_level_mistral())
    sample = FORMATS["messages"].parse({"messages": messages})
    tokens = encoded(encoder, sample)
    if len(tokens.ids) <= most:
        return
    for kept in fit(sample, tokens, encoder, most, "truncate"):
        assert len(kept.ids) <= most
        trained = kept.ids[kept.trained].tolist()
        assert len(trained) > 0
        assert tokens.ids[tokens.trained].tolist()[: len(trained)] == trained
