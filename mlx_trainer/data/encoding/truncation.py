"""Rows longer than the maximum: what becomes of them."""

from bisect import bisect_left
from functools import cache
from typing import Literal

from attrs import evolve

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.samples.conversation import Conversation, Sample, Text

Truncation = Literal["truncate", "split", "drop", "error"]
TRUNCATIONS: tuple[Truncation, ...] = ("truncate", "split", "drop", "error")


def fit(sample: Sample, tokens: Tokens, encoder: SampleEncoder, most: int, policy: Truncation) -> list[Tokens]:
    """What is left of a sample whose `tokens` are more than `most`: rows that have a trained token, perhaps none.

    "truncate" keeps as many whole turns of a conversation as fit, encoded anew, so that what stands before the last
    question, as Mistral's system text does, still does; where not even one turn fits, and in other rows, the tail is
    lost. "split" cuts texts into rows that overlap by one token, so that each token but the first is trained once;
    other rows are truncated. "drop" and "error" leave nothing.
    """
    if policy == "split" and isinstance(sample, Text):
        return [part for part in split_text(tokens, most) if part.trained.any()]
    if policy in ("drop", "error"):
        return []
    shorter = cut(whole_turns(sample, tokens, encoder, most), most)
    return [shorter] if shorter.trained.any() else []


def cut(tokens: Tokens, most: int) -> Tokens:
    """The first `most` tokens."""
    return evolve(tokens, ids=tokens.ids[:most], trained=tokens.trained[:most])


def split_text(tokens: Tokens, most: int) -> list[Tokens]:
    """Parts of at most `most` tokens; each begins with the last token of the one before it, there untrained."""
    starts = range(0, max(len(tokens.ids) - 1, 1), most - 1)
    return [Tokens.of(tokens.ids[start : start + most], tokens.trained[start : start + most]) for start in starts]


def whole_turns(sample: Sample, tokens: Tokens, encoder: SampleEncoder, most: int) -> Tokens:
    """The tokens of the longest beginning of a conversation in whole turns that fits, else of the shortest there is.

    Of a sample without several turns it is all its `tokens`.
    """
    shorter = list(sample.shortened()) if isinstance(sample, Conversation) else []

    @cache  # the one that fits was tried before
    def encoded(turns: int) -> Tokens:
        """The beginning with so many turns more than the shortest."""
        (result,) = encoder.encode([shorter[len(shorter) - 1 - turns]])
        assert isinstance(result, Tokens)  # a beginning of what could be encoded
        return result

    if not shorter:
        return tokens
    too_long = bisect_left(range(len(shorter)), True, key=lambda turns: len(encoded(turns).ids) > most)
    return encoded(max(too_long - 1, 0))
