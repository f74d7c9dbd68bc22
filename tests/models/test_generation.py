"""Generation: prompts as ids, where it stops, and that it leaves nothing behind."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer.models import generation
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.generation import continue_ids, encode_prompt, stop_ids
from mlx_trainer.models.loading import load_model, load_tokenizer
from mlx_trainer.state import random_state
from tests.tiny import tiny_mistral

IDS = [1, 3, 40, 50, 60, 4]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, written once."""
    return tiny_mistral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    """The model in that folder."""
    return load_model(directory, dtype="float32")


@pytest.fixture
def tokenizer(directory: Path) -> Any:
    """Its tokenizer, fresh for each test."""
    return load_tokenizer(directory)


def test_a_prompt_has_one_beginning_and_ends_where_the_answer_starts(tokenizer: Any) -> None:
    """A text equals one user message: `<s>[INST] text[/INST]`; the system text goes into the last user message."""
    ids = encode_prompt(tokenizer, "Where is it?")
    assert tokenizer.decode(ids) == "<s>[INST] Where is it?[/INST]"
    assert (ids[:2], ids[-1], ids.count(1)) == ([1, 3], 4, 1)
    assert encode_prompt(tokenizer, [{"role": "user", "content": "Where is it?"}]) == ids
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    rendered = "<s>[INST] user[/INST] assistant</s>[INST] system\n\nuser[/INST]"
    assert tokenizer.decode(encode_prompt(tokenizer, chat)) == rendered


def test_without_a_template_text_is_continued_and_messages_are_refused(tokenizer: Any) -> None:
    """A base model's tokenizer has no template: the text itself is the prompt, its `<s>` written once."""
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "The sum")) == "<s>The sum"
    with pytest.raises(ModelError, match="has no chat template, so a prompt must be text"):
        encode_prompt(tokenizer, [{"role": "user", "content": "The sum"}])


def test_greedy_is_the_argmax_of_the_whole_sequence(model: Any) -> None:
    """Each token is the likeliest after all before it, as computed without a cache."""
    answer = continue_ids(model, IDS, max_tokens=6, stop=())
    expected = list(IDS)
    for _ in range(6):
        expected.append(int(mx.argmax(model(mx.array([expected]))[0, -1]).item()))
    assert answer == expected[len(IDS) :]


def test_it_ends_before_a_stop_token(model: Any) -> None:
    """The answer is what came before the first of the stop tokens, which is not part of it."""
    answer = continue_ids(model, IDS, max_tokens=6, stop=())
    first = answer.index(answer[3])
    assert continue_ids(model, IDS, max_tokens=6, stop={answer[3]}) == answer[:first]


def test_a_timeout_returns_what_there_is(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read between tokens: with a clock that moves 1 s a reading, 3 s give three tokens."""
    readings = iter(range(1000))
    monkeypatch.setattr(generation.time, "monotonic", lambda: float(next(readings)))
    answer = continue_ids(model, IDS, max_tokens=50, stop=(), timeout_s=3.0)
    monkeypatch.undo()
    assert answer == continue_ids(model, IDS, max_tokens=3, stop=())


def test_sampling_follows_its_seed_and_leaves_the_global_state(model: Any) -> None:
    """The same seed draws the same tokens whatever MLX's random state is, and that state and the stream stay."""
    answers, stream = [], mx.default_stream(mx.default_device())
    for global_seed, seed in ((0, 3), (1, 3), (1, 4)):
        mx.random.seed(global_seed)
        before = random_state()
        answers.append(continue_ids(model, IDS, max_tokens=8, stop=(), temperature=1.5, seed=seed))
        assert random_state() == before
        assert mx.default_stream(mx.default_device()) == stream
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(("eos", "expected"), [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})])
def test_stop_tokens_come_from_tokenizer_and_configuration(tokenizer: Any, eos: object, expected: set[int]) -> None:
    """A configuration may name one end token, several, or none; the tokenizer's always counts."""
    assert stop_ids(tokenizer, {"eos_token_id": eos}) == expected
