"""Preferences to tokens: two rows with the same prompt, of which only the answers are trained."""

from collections.abc import Sequence

import numpy as np

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.encoding.tokenizer import Tokens
from mlx_trainer.data.encoding.truncation import Truncation
from mlx_trainer.data.samples.conversation import Preference, RowError, Sample

Pair = tuple[Tokens, Tokens]
"""The tokens of the prompt with the chosen answer, and with the rejected one."""
NO_PAIR = "a pair needs chosen and rejected; train other rows with training.method lora"


def encode_pairs(samples: Sequence[Sample], encoder: SampleEncoder) -> list[Pair | RowError]:
    """The tokens of both sides of each sample in order, or why it has none."""
    sides = [side for sample in samples if isinstance(sample, Preference) for side in sample.conversations()]
    encoded = iter(encoder.encode(sides))
    return [
        checked(next(encoded), next(encoded)) if isinstance(sample, Preference) else RowError(NO_PAIR)
        for sample in samples
    ]


def checked(chosen: Tokens | RowError, rejected: Tokens | RowError) -> Pair | RowError:
    """Both sides, or why they are no pair."""
    if isinstance(chosen, RowError):
        return RowError(f"chosen, as messages: {chosen}")
    if isinstance(rejected, RowError):
        return RowError(f"rejected, as messages: {rejected}")
    prompt = prompt_length(chosen, rejected)
    if not np.array_equal(chosen.ids[:prompt], rejected.ids[:prompt]):
        return RowError("chosen, rejected: what follows the prompt changes how it is written, so the two share none")
    if np.array_equal(chosen.ids, rejected.ids):
        return RowError("chosen, rejected: the same tokens, so neither can be preferred")
    return chosen, rejected


def prompt_length(chosen: Tokens, rejected: Tokens) -> int:
    """How many tokens come before what is trained of either."""
    return min(int(np.argmax(side.trained)) for side in (chosen, rejected))


def fit_pair(pair: Pair, most: int, policy: Truncation, bos: int | None) -> Pair | None:
    """The pair with the beginning of its prompt cut off, on both sides alike, so that neither has more than `most`.

    The answers stay whole, and BOS stays. None where this cannot be, or where `policy` lets nothing be cut.
    """
    begin = int(pair[0].ids[0] == bos)
    first = begin + max(len(side.ids) for side in pair) - most
    if policy in ("drop", "error") or first >= prompt_length(*pair):
        return None
    kept, rest = slice(0, begin), slice(first, None)
    chosen, rejected = (
        Tokens(*(np.concatenate([part[kept], part[rest]]) for part in (side.ids, side.trained))) for side in pair
    )
    return chosen, rejected
