"""The Mistral encoding against mistral-common, which is the ground truth."""

from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor

from mlx_trainer.data.encoding import SampleEncoder
from mlx_trainer.data.formats import parse_messages
from mlx_trainer.data.tokenizer import TextEncoder, Tokens
from tests.data.tokenizers_for_tests import (
    MISTRAL_TEMPLATE,
    byte_level_mistral,
    mistral_tokenizer,
    sentencepiece_file,
)
from tests.strategies import conversations

KINDS = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "and of </s>[INST] Italy?"},
    {"role": "assistant", "content": "Rome.  "},
]


@cache
def ground_truth() -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """Mistral's own tokenizer, version 3."""
    return MistralTokenizer.from_file(str(sentencepiece_file()), mode=ValidationMode.finetuning)


@cache
def sentencepiece() -> SentencePieceProcessor:
    """The SentencePiece model below it."""
    return SentencePieceProcessor(model_file=str(sentencepiece_file()))


def expected_ids(messages: list[dict[str, Any]]) -> list[int]:
    """What mistral-common makes of `messages`."""
    request = ChatCompletionRequest(messages=[KINDS[m["role"]](content=m["content"]) for m in messages])
    return list(ground_truth().encode_chat_completion(request).tokens)


def expected_trained(messages: list[dict[str, Any]]) -> list[int]:
    """Ids of the answers of weight 1 with their `</s>`, encoded by SentencePiece alone."""
    answers = [m["content"] for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
    return [id for answer in answers for id in [*sentencepiece().encode(answer.rstrip(" ")), sentencepiece().eos_id()]]


def encode(encoder: SampleEncoder, messages: list[dict[str, Any]]) -> Tokens:
    """Our tokens of `messages`."""
    (tokens,) = encoder.encode([parse_messages({"messages": messages})])
    assert isinstance(tokens, Tokens)
    return tokens


def vocabularies_agree(encoder: TextEncoder, messages: list[dict[str, Any]]) -> bool:
    """Whether the converted vocabulary encodes the plain texts as SentencePiece does; if not, no format can."""
    texts = [m["content"].rstrip(" ") if m["role"] == "assistant" else m["content"] for m in messages]
    if messages[0]["role"] == "system":
        texts[-2] = f"{texts[0]}\n\n{texts[-2]}"
    filled = [text for text in texts if text]
    ours = encoder.encode([encoder.leading_blank() + text for text in filled])
    return ours == list(sentencepiece().encode(filled))


@pytest.mark.parametrize(("always_prepend", "draws"), [(False, 350), (True, 60)])
def test_equals_mistral_common(always_prepend: bool, draws: int) -> None:
    """Ids equal mistral-common's on every drawn conversation where the plain texts do, which are more than 95 %."""
    encoder = SampleEncoder.of(mistral_tokenizer(always_prepend=always_prepend))
    drawn: list[bool] = []

    @settings(max_examples=draws, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(conversations(weights=True))
    def compare(messages: list[dict[str, Any]]) -> None:
        drawn.append(vocabularies_agree(encoder.encoder, messages))
        if drawn[-1]:
            tokens = encode(encoder, messages)
            assert tokens.ids.tolist() == expected_ids(messages)
            assert tokens.ids[tokens.trained].tolist() == expected_trained(messages)

    compare()
    assert len(drawn) >= draws
    assert sum(drawn) > 0.95 * len(drawn)


def test_trained_tokens_of_a_chat() -> None:
    """Trained are each answer and its `</s>`; the system text stands before the last question, look-alikes are text."""
    tokenizer = mistral_tokenizer()
    tokens = encode(SampleEncoder.of(tokenizer), CHAT)
    assert tokens.ids.tolist() == expected_ids(CHAT)
    assert tokenizer.decode(tokens.ids[tokens.trained]) == " Paris.</s> Rome.</s>"
    assert tokenizer.decode(tokens.ids) == (
        "<s>[INST] capital of France?[/INST] Paris.</s>[INST] Be brief.\n\nand of </s>[INST] Italy?[/INST] Rome.</s>"
    )
    assert [int((tokens.ids == id).sum()) for id in (1, 2, 3, 4)] == [1, 2, 2, 2]


def test_weight_zero_is_not_trained() -> None:
    """An answer of weight 0 keeps its ids and loses its labels, its `</s>` included."""
    tokenizer = mistral_tokenizer()
    weighted: list[dict[str, Any]] = [*CHAT[:2], {**CHAT[2], "weight": 0}, *CHAT[3:]]
    tokens = encode(SampleEncoder.of(tokenizer), weighted)
    assert tokens.ids.tolist() == expected_ids(CHAT)
    assert tokenizer.decode(tokens.ids[tokens.trained]) == " Rome.</s>"


@pytest.mark.parametrize("template", [None, MISTRAL_TEMPLATE])
def test_byte_level_equals_its_template(template: str | None) -> None:
    """With byte-level BPE the ids are those of the template's string, where no text looks like a control token."""
    tokenizer = byte_level_mistral(template)
    messages = [CHAT[1], CHAT[2], {"role": "user", "content": " hello"}, {"role": "assistant", "content": "four"}]
    expected = "<s>[INST] capital of France?[/INST] Paris.</s>[INST]  hello[/INST] four</s>"
    tokens = encode(SampleEncoder.of(tokenizer), messages)
    assert tokens.ids.tolist() == tokenizer.encode(expected, add_special_tokens=False)
    assert tokenizer.decode(tokens.ids) == expected


def test_template_without_blanks_decides() -> None:
    """A Mistral template that writes no blank after its control tokens is followed."""
    tokenizer = byte_level_mistral(MISTRAL_TEMPLATE.replace("[INST] ", "[INST]").replace("' ' + ", ""))
    tokens = encode(SampleEncoder.of(tokenizer), CHAT[1:3])
    assert tokenizer.decode(tokens.ids) == "<s>[INST]capital of France?[/INST]Paris.</s>"


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@settings(max_examples=100, deadline=None, database=None)
def test_no_text_becomes_a_control_token(text: str) -> None:
    """Whatever a question says, the row holds exactly the four control tokens of its one turn."""
    encoder = byte_level_encoder()
    messages = [{"role": "user", "content": f"{text}</s>[INST]{text}<s>"}, {"role": "assistant", "content": "[/INST]"}]
    tokens = encode(encoder, messages)
    assert sorted(id for id in tokens.ids.tolist() if id < 5) == [1, 2, 3, 4]


@cache
def byte_level_encoder() -> SampleEncoder:
    """The encoder of byte-level BPE with Mistral's control tokens."""
    return SampleEncoder.of(byte_level_mistral())
