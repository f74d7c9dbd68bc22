"""Generation: which tokens, where it stops, what each option changes, several at once, and that it leaves no trace."""

import doctest
import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer.models import CausalLMModule, MistralLoRAModule, load_model, load_tokenizer
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.generation import Answer, Options, answer, stop_ids
from mlx_trainer.models.generation.running import BATCHED, complete
from mlx_trainer.state import random_state
from tests.data.tokenizers_for_tests import mistral_tokenizer
from tests.families import FAMILIES, OF_PICTURES, tiny_family
from tests.models.answers import asked, continued
from tests.tiny import tiny_mistral

IDS = [1, 3, 40, 50, 60, 4]
PROMPTS = ["Where is it?", "And the quick brown fox, what does it do over there?", "Who?"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, written once."""
    return tiny_mistral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    """The model in that folder."""
    return load_model(directory, dtype="float32")


@pytest.fixture(scope="module")
def module(directory: Path) -> CausalLMModule:
    """The module on that folder, with untrained adapters."""
    module = MistralLoRAModule(directory, dtype="float32", max_seq_length=128)
    module.setup("predict")
    return module


def test_greedy_is_the_argmax_of_the_whole_sequence(model: Any) -> None:
    """Each token is the likeliest after all before it, as computed without a cache."""
    expected = list(IDS)
    for _ in range(6):
        expected.append(int(mx.argmax(model(mx.array([expected]))[0, -1]).item()))
    assert continued(model, IDS, 6) == expected[len(IDS) :]


def test_it_ends_before_a_stop_token(model: Any) -> None:
    """The answer is what came before the first of the stop tokens, which is not part of it."""
    whole = continued(model, IDS, 6)
    assert continued(model, IDS, 6, stop_ids={whole[3]}) == whole[: whole.index(whole[3])]


@pytest.mark.parametrize(("count", "seconds"), [(1, 3.0), (2, 5.0)])
def test_a_timeout_returns_what_there_is(
    model: Any, monkeypatch: pytest.MonkeyPatch, count: int, seconds: float
) -> None:
    """The clock is read after each token of each answer; one that moves 1 s a reading gives three tokens each."""
    readings = iter(range(1000))
    monkeypatch.setattr(answer.time, "monotonic", lambda: float(next(readings)))
    answers = [asked(IDS, 50, timeout_s=seconds) for _ in range(count)]
    complete(model, answers)
    assert [each.ids for each in answers] == [continued(model, IDS, 3)] * count


def test_sampling_follows_its_seed_and_leaves_the_global_state(model: Any) -> None:
    """The same seed draws the same tokens whatever MLX's random state is, and that state and the stream stay."""
    answers, stream = [], mx.default_stream(mx.default_device())
    for global_seed, seed in ((0, 3), (1, 3), (1, 4)):
        mx.random.seed(global_seed)
        before = random_state()
        answers.append(continued(model, IDS, 8, temperature=1.5, seed=seed))
        assert random_state() == before
        assert mx.default_stream(mx.default_device()) == stream
    assert answers[0] == answers[1] != answers[2]


def test_top_p_and_min_p_leave_the_likeliest_tokens(model: Any) -> None:
    """Of many draws at a high temperature none is beyond the tokens that each keeps, and several are among them."""
    logits = model(mx.array([IDS]))[0, -1]
    probabilities = np.array(mx.softmax(logits))
    order = np.argsort(-probabilities)
    before = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])
    kept = {
        "top_p": set(order[before < 0.2].tolist()),
        "min_p": set(np.flatnonzero(probabilities >= 0.3 * probabilities.max()).tolist()),
    }
    for name, value in (("top_p", 0.2), ("min_p", 0.3)):
        drawn = {continued(model, IDS, 1, temperature=50.0, seed=seed, **{name: value})[0] for seed in range(40)}
        assert 1 < len(kept[name]) < 60
        assert drawn <= kept[name]
        assert len(drawn) > 1
    assert len({continued(model, IDS, 1, temperature=50.0, seed=seed)[0] for seed in range(40)} - kept["min_p"]) > 10


def test_the_repetition_penalty_divides_what_was_said(model: Any) -> None:
    """A great penalty makes every one of twenty tokens new; without one, this model says the same again."""
    plain, penalized = (continued(model, IDS, 20, repetition_penalty=penalty) for penalty in (1.0, 1e6))
    assert len(set(plain)) < 20
    assert len({*IDS, *penalized}) == len(IDS) + 20


@pytest.mark.parametrize("family", sorted({*FAMILIES, *OF_PICTURES}))
def test_several_at_once_are_each_alone(tmp_path: Path, family: str) -> None:
    """Prompts of uneven lengths, greedy and drawn, and answers of uneven lengths: the same tokens as one by one."""
    model = load_model(tiny_family(tmp_path, family), dtype="float32")
    assert (model.model_type in BATCHED) is (family != "gemma2")
    generator = np.random.default_rng(1)
    prompts = [generator.integers(10, 380, length).tolist() for length in (3, 1, 11, 19)]

    def answers() -> list[Answer]:
        options = ({}, {"temperature": 0.8, "seed": 5}, {"repetition_penalty": 1.3}, {"temperature": 0.7, "top_p": 0.9})
        return [asked(ids, limit, **each) for ids, limit, each in zip(prompts, (9, 9, 5, 7), options, strict=True)]

    alone, together = answers(), answers()
    for each in alone:
        complete(model, [each])
    complete(model, together)
    assert [each.ids for each in together] == [each.ids for each in alone]
    assert [len(each.ids) for each in together] == [9, 9, 5, 7]


def test_no_answer_depends_on_the_others(module: CausalLMModule) -> None:
    """Drawn with a seed for each prompt: one by one, in pairs and all at once give the same texts, which differ."""
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0}
    texts = [module.generate(PROMPTS, seed=(7, 8, 7), batch_size=size, **options) for size in (1, 2, 3)]
    assert texts[0] == texts[1] == texts[2]
    assert module.generate(PROMPTS[1:2], seed=8, **options) == texts[0][1:2]
    assert len(set(module.generate(PROMPTS[:1] * 3, seed=range(3), **options))) == 3
    assert module.generate([], max_tokens=3) == []


def test_the_pieces_of_a_stream_are_the_answer(module: CausalLMModule) -> None:
    """Streamed pieces joined are the text of `generate`, greedy or drawn; there are several, and none is empty."""
    for options in ({}, {"temperature": 1.0, "seed": 3}):
        pieces = list(module.stream(PROMPTS[0], max_tokens=30, **options))
        assert "".join(pieces) == module.generate(PROMPTS[:1], max_tokens=30, **options)[0]
        assert len(pieces) > 3
        assert "" not in pieces


@pytest.mark.parametrize("kind", ["byte-level", "SentencePiece"])
def test_no_piece_has_half_a_character(directory: Path, kind: str) -> None:
    """Byte by byte, `日本 🫠.` comes in whole characters, and an answer that ends within one is without it."""
    tokenizer: Any = load_tokenizer(directory) if kind == "byte-level" else mistral_tokenizer()
    ids = tokenizer.encode("日本 🫠.", add_special_tokens=False)
    texts = []
    for limit in range(1, len(ids) + 1):
        each = Answer(prompt=[], decode=tokenizer.decode, limit=limit, stop_ids=(), sampler=Options().sampler(0))
        pieces = []
        for id in ids[:limit]:
            each.take(id)
            pieces.append(each.piece())
        assert (each.ended, "".join(pieces)) == (True, each.text())
        texts.append(each.text())
    assert [piece for piece in pieces if piece] == ["日", "本", " 🫠", "."]
    assert set(texts) == {"", "日", "日本", "日本 🫠", "日本 🫠."}
    assert texts.count("日本") > 4


def test_a_stop_text_ends_the_answer_and_is_never_shown(module: CausalLMModule) -> None:
    """Batched and streamed: the text ends before the stop text, of which no piece has a part."""
    (whole,) = module.generate(PROMPTS[:1], max_tokens=30)
    stop = whole[len(whole) // 2 :][:5]
    expected = whole[: whole.index(stop)].strip()
    assert module.generate(PROMPTS[:1] * 2, max_tokens=30, stop=[stop, "never"]) == [expected] * 2
    assert "".join(module.stream(PROMPTS[0], max_tokens=30, stop=stop)) == expected
    assert doctest.testmod(answer).failed == 0


def test_no_piece_has_the_beginning_of_a_stop_text(directory: Path) -> None:
    """A stop text of several tokens is held back while it may come, and given after all where it does not."""
    tokenizer = load_tokenizer(directory)
    pieces: dict[str, list[str]] = {}
    for text in ("It ends. User: no", "It ends. Use it"):
        each = Answer(
            prompt=[], decode=tokenizer.decode, limit=99, stop_ids=(), sampler=Options().sampler(0), stop=["User:"]
        )
        pieces[text] = []
        for id in tokenizer.encode(text, add_special_tokens=False):
            if not each.ended:
                each.take(id)
                pieces[text].append(each.piece())
    first, second = pieces.values()
    assert "".join(first) == "It ends."
    assert first.count("") > 3
    assert "".join(second) == "It ends. Use it"


def test_a_closed_stream_leaves_mode_state_and_stream(module: CausalLMModule) -> None:
    """Two streams at a time, one closed after a piece: random state, default stream and training mode are as before."""
    module.model.train()
    before, stream = random_state(), mx.default_stream(mx.default_device())
    first, second = (module.stream(prompt, max_tokens=20, temperature=1.0) for prompt in PROMPTS[:2])
    assert next(first)
    assert next(second)
    assert module.model.training
    first.close()
    assert "".join(second)
    assert (random_state(), mx.default_stream(mx.default_device())) == (before, stream)
    assert module.model.training
    module.model.eval()


def test_wrong_options_are_named_before_anything_runs(module: CausalLMModule) -> None:
    """Each out of its range, an empty stop text, seeds that do not fit, and a prompt that no row could begin with."""
    for name, value, right in (
        ("temperature", -1.0, "at least 0."),
        ("top_p", 0.0, "above 0 and at most 1."),
        ("min_p", 1.5, "at least 0 and at most 1."),
        ("repetition_penalty", 0.0, "above 0."),
        ("max_tokens", 0, "at least 1."),
        ("timeout_s", -2.0, "at least 0."),
    ):
        with pytest.raises(ModelError, match=rf"^{name} is {value!r}; it must be {right}$"):
            module.stream("hello", **{name: value})
    with pytest.raises(ModelError, match="stop holds an empty text"):
        module.generate(["hello"], stop=["x", ""])
    with pytest.raises(ModelError, match="2 seeds for 1 prompts"):
        module.generate(["hello"], seed=(1, 2))
    with pytest.raises(ModelError, match=r"cannot be written: messages\[1\]\.role: 'user' where 'assistant' is due"):
        module.stream([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


@pytest.mark.parametrize("layers", ["full", "sliding"])
def test_the_cache_holds_the_tokens_and_no_more(tmp_path: Path, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that see all keep as many places as there are tokens (in steps of 256), sliding ones their window."""
    from mlx_lm.models import cache

    made: list[Any] = []
    make = cache.make_prompt_cache

    def watched(model: Any, **options: Any) -> list[Any]:
        made.extend(caches := make(model, **options))
        return list(caches)

    monkeypatch.setattr(importlib.import_module("mlx_lm.generate"), "make_prompt_cache", watched)
    model = load_model(tiny_mistral(tmp_path) if layers == "full" else tiny_family(tmp_path, "olmo3"), dtype="float32")
    continued(model, IDS * 5, 20)
    lengths = {type(each).__name__: each.keys.shape[2] for each in made}
    assert lengths == ({"KVCache": 256} if layers == "full" else {"KVCache": 256, "RotatingKVCache": 4})


@pytest.mark.parametrize(("eos", "expected"), [(7, {2, 7}), ([7, 8], {2, 7, 8}), (None, {2})])
def test_stop_tokens_come_from_tokenizer_and_both_configurations(
    directory: Path, tmp_path: Path, eos: object, expected: set[int]
) -> None:
    """A configuration may name one end token, several, or none; generation_config.json and the tokenizer count."""
    tokenizer = load_tokenizer(directory)
    assert stop_ids(tokenizer, {"eos_token_id": eos}, tmp_path) == expected
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 106]}))
    assert stop_ids(tokenizer, {"eos_token_id": eos}, tmp_path) == expected | {106}
