"""Texts and prompt/completion pairs."""

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_trainer.data.encoding.encoder import CompletionStyle, SampleEncoder
from mlx_trainer.data.encoding.tokenizer import TextEncoder, Tokens
from mlx_trainer.data.samples.conversation import (
    Conversation,
    DataError,
    Message,
    PromptCompletion,
    RowError,
    Sample,
    Text,
)
from tests.data.tokenizers_for_tests import byte_level_mistral, chatml_tokenizer, mistral_tokenizer


def parts(tokenizer: PreTrainedTokenizerFast, sample: Sample, style: CompletionStyle = "chat") -> tuple[str, str]:
    """The text of all ids of `sample`, and of the trained ones."""
    (row,) = SampleEncoder.of(tokenizer, style).encode([sample])
    assert isinstance(row, Tokens), row
    return str(tokenizer.decode(row.ids)), str(tokenizer.decode(row.ids[row.trained]))


def test_text_is_trained_between_bos_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    """A text stands between BOS and EOS, all of it trained but BOS, which nothing predicts."""
    assert parts(tokenizer, Text("hello </s>")) == ("<s>hello </s></s>", "hello </s></s>")
    assert parts(chatml_tokenizer(), Text("hello Paris")) == ("hello Paris<|im_end|>", " Paris<|im_end|>")


def test_completion_styles(tokenizer: PreTrainedTokenizerFast) -> None:
    """A pair is one chat turn by default; raw, it is joined as it stands. Only the completion is trained."""
    pair = PromptCompletion("Q: two plus two?\nA:", " four")
    assert parts(tokenizer, pair) == ("<s>[INST] Q: two plus two?\nA:[/INST]  four</s>", "  four</s>")
    assert parts(tokenizer, pair, "raw") == ("<s>Q: two plus two?\nA: four</s>", " four</s>")


@pytest.mark.parametrize("make", [byte_level_mistral, mistral_tokenizer, chatml_tokenizer])
def test_raw_completion_starts_inside_a_token(make: type[PreTrainedTokenizerFast]) -> None:
    """Raw ids are those of the joined text; a token that reaches from prompt into completion is trained."""
    tokenizer = make()
    pair = PromptCompletion("what is the capital of France? ", "Paris is")
    whole, trained = parts(tokenizer, pair, "raw")
    (row,) = SampleEncoder.of(tokenizer, "raw").encode([pair])
    assert isinstance(row, Tokens)
    ids = tokenizer.encode(pair.prompt + pair.completion, add_special_tokens=False)
    start = 0 if tokenizer.bos_token_id is None else 1
    assert row.ids.tolist() == [*[tokenizer.bos_token_id][:start], *ids, tokenizer.eos_token_id]
    assert trained.removesuffix(tokenizer.eos_token).strip() == "Paris is"
    assert whole.endswith("France? Paris is" + tokenizer.eos_token)


def test_kinds_may_be_mixed(tokenizer: PreTrainedTokenizerFast) -> None:
    """Samples of all kinds are encoded together, in their order, as each of them alone."""
    chat = Conversation((Message("user", "hello"), Message("assistant", "world")))
    samples: list[Sample] = [Text("one"), chat, PromptCompletion("two", "three"), Text("four"), chat]
    encoder = SampleEncoder.of(tokenizer)
    together = [row.ids.tolist() for row in encoder.encode(samples) if isinstance(row, Tokens)]
    assert together == [row.ids.tolist() for s in samples for row in encoder.encode([s]) if isinstance(row, Tokens)]
    assert len(together) == 5


def test_a_row_of_one_token_is_bad() -> None:
    """A text of a single token, without BOS and EOS around it, has nothing that predicts it."""
    (row,) = SampleEncoder.of(chatml_tokenizer(eos_token=None)).encode([Text("a")])
    assert isinstance(row, RowError)
    assert "nothing would be trained" in str(row)


def test_the_tokenizer_stays_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    """Padding and truncation of the caller's tokenizer have no effect on rows and are left alone."""
    own = byte_level_mistral()
    own.backend_tokenizer.enable_truncation(3)
    own.backend_tokenizer.enable_padding(length=50)
    assert parts(own, Text("hello world")) == parts(tokenizer, Text("hello world"))
    assert own.backend_tokenizer.truncation is not None
    assert own.backend_tokenizer.truncation["max_length"] == 3
    assert own.backend_tokenizer.encode_special_tokens is False


def test_a_tokenizer_without_backend_is_refused() -> None:
    """A tokenizer that is not one of the tokenizers library is refused by its class's name."""
    with pytest.raises(DataError, match="object has no `backend_tokenizer`"):
        TextEncoder(object())  # type: ignore[arg-type]
