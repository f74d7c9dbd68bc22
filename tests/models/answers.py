"""Answers to prompts of bare ids, for tests that look at tokens and not at texts."""

from collections.abc import Collection, Sequence
from typing import Any

from mlx_trainer.models.generation import Answer, Options
from mlx_trainer.models.generation.running import complete


def asked(
    prompt: Sequence[int], limit: int, *, seed: int = 0, stop_ids: Collection[int] = (), **options: Any
) -> Answer:
    """An answer of at most `limit` tokens that has not begun; its text is its ids."""
    chosen = Options(**options)
    return Answer(
        prompt=prompt,
        decode=lambda ids: " ".join(map(str, ids)),
        limit=limit,
        stop_ids=stop_ids,
        sampler=chosen.sampler(seed),
        processors=chosen.processors(),
        stop=chosen.stop,
        timeout_s=chosen.timeout_s,
    )


def continued(model: Any, prompt: Sequence[int], limit: int, **options: Any) -> list[int]:
    """The ids that `model` continues `prompt` with."""
    answer = asked(prompt, limit, **options)
    complete(model, [answer])
    return answer.ids
