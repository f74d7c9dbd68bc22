"""Samples to tokens: each kind of sample with its own rule for what is trained, all encoded in batches."""

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Literal, Self

import numpy as np
from attrs import frozen

from mlx_trainer.data.encoding.mistral import MistralFormat
from mlx_trainer.data.encoding.sheet import Sheet
from mlx_trainer.data.encoding.template import TemplateFormat
from mlx_trainer.data.encoding.tokenizer import ChatTokenizer, TextEncoder, Tokens
from mlx_trainer.data.samples.conversation import (
    Conversation,
    DataError,
    Preference,
    PromptCompletion,
    RowError,
    Sample,
    Text,
)

logger = logging.getLogger("mlx_trainer.data")

CompletionStyle = Literal["chat", "raw"]
ChatEncoder = Callable[[Sequence[Conversation]], Sequence[Tokens | RowError]]


@frozen
class SampleEncoder:
    """Encodes conversations, prompt/completion pairs and texts for one tokenizer."""

    encoder: TextEncoder
    bos: int | None
    eos: int | None
    encode_chats: ChatEncoder
    completion_style: CompletionStyle

    @classmethod
    def of(cls, tokenizer: ChatTokenizer, completion_style: CompletionStyle = "chat") -> Self:
        """The encoder for `tokenizer`; raises DataError where it cannot be used."""
        encoder = TextEncoder(tokenizer)
        chats = chat_encoder(tokenizer, encoder)
        return cls(encoder, tokenizer.bos_token_id, tokenizer.eos_token_id, chats, completion_style)

    def encode(self, samples: Sequence[Sample]) -> list[Tokens | RowError]:
        """Tokens of each sample in order, or why it has none; a sample in which nothing is trained has none.

        All conversations are encoded in one batch, and so are all texts.
        """
        kinds: tuple[tuple[type[Sample], Callable[..., Sequence[Tokens | RowError]]], ...] = (
            (Conversation, self.encode_chats),
            (PromptCompletion, self.completions),
            (Text, self.texts),
            (Preference, refuse_preferences),
        )
        if self.completion_style == "chat":
            samples = [s.as_conversation() if isinstance(s, PromptCompletion) else s for s in samples]
        encoded = {kind: iter(encode([s for s in samples if isinstance(s, kind)])) for kind, encode in kinds}
        return [refuse_untrained(next(encoded[type(sample)])) for sample in samples]

    def texts(self, samples: Sequence[Text]) -> list[Tokens]:
        """BOS, text, EOS; all trained but the first."""
        sheet = Sheet()
        for sample in samples:
            if self.bos is not None:
                sheet.control(self.bos)
            sheet.text(sample.text, trained=True)
            if self.eos is not None:
                sheet.control(self.eos, trained=True)
            sheet.end_row()
        return sheet.tokens(self.encoder)

    def completions(self, samples: Sequence[PromptCompletion]) -> list[Tokens]:
        """Prompt and completion one behind the other, in raw style."""
        encoded = self.encoder.encode_with_ends([sample.prompt + sample.completion for sample in samples])
        return [self.raw(ids, ends, len(sample.prompt)) for sample, (ids, ends) in zip(samples, encoded, strict=True)]

    def raw(self, ids: Sequence[int], ends: Sequence[int], prompt: int) -> Tokens:
        """BOS, prompt and completion, EOS; trained is each token that reaches beyond the prompt's last letter."""
        start, stop = ([] if id is None else [id] for id in (self.bos, self.eos))
        first = len(start) + bisect_right(ends, prompt)
        whole = [*start, *ids, *stop]
        return Tokens.of(whole, np.arange(len(whole)) >= first)


def refuse_preferences(samples: Sequence[Preference]) -> list[RowError]:
    """Why preferences have no tokens."""
    return [
        RowError(
            "chosen, rejected: these rows are for training.method dpo or orpo (DataPipeline: pairs=True); "
            "to fine-tune on the chosen answers give them as prompt and completion, or as messages"
        )
        for _ in samples
    ]


def refuse_untrained(row: Tokens | RowError) -> Tokens | RowError:
    """A RowError in place of tokens none of which is trained."""
    if isinstance(row, Tokens) and not row.trained.any():
        return RowError("nothing would be trained: the row is a single token, or its answers have none")
    return row


def chat_encoder(tokenizer: ChatTokenizer, encoder: TextEncoder) -> ChatEncoder:
    """How `tokenizer` writes conversations; where it cannot, one raises DataError."""
    written = chat_format(tokenizer, encoder)
    if isinstance(written, MistralFormat):
        return lambda conversations: written.encode(conversations, encoder)
    return refuse_chats if written is None else written.encode


def chat_format(tokenizer: ChatTokenizer, encoder: TextEncoder) -> MistralFormat | TemplateFormat | None:
    """Mistral's format where `tokenizer` writes that one, else its chat template, None where it has none."""
    mistral = MistralFormat.of(tokenizer, encoder)
    if mistral is not None:
        return mistral
    if tokenizer.chat_template is not None:
        if encoder.control_id("[INST]") is not None:
            logger.warning(
                "The tokenizer has Mistral's control tokens, but its chat template writes another format than "
                "mistral-common; rows are written with the template"
            )
        return TemplateFormat(tokenizer, TextEncoder(tokenizer, control_tokens=True))
    return None


def refuse_chats(conversations: Sequence[Conversation]) -> list[Tokens | RowError]:
    """Raise DataError if there is any conversation: the tokenizer cannot write one."""
    if conversations:
        raise DataError(
            "The rows are conversations, but the tokenizer has neither a chat template nor Mistral's control tokens "
            "([INST], [/INST]). Use an instruct model's tokenizer, set `tokenizer.chat_template`, give rows of "
            'the form {"text": …}, or prompt/completion rows with completion_style="raw".'
        )
    return []
