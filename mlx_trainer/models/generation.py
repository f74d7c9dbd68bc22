"""Prompts to ids, and ids to the ids a model continues them with."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.models.error import ModelError
from mlx_trainer.models.libraries import quiet_imports

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Sampler = Callable[[mx.array], mx.array]


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return the ids of `prompt` up to where the answer begins; a text is one user message.

    The template writes the one beginning-of-text token itself. Without a template, text is encoded as it stands and
    messages raise ModelError, as does what the template cannot write.
    """
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ModelError("This tokenizer has no chat template, so a prompt must be text, not a list of messages.")
        return list(tokenizer.encode(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    try:
        return list(tokenizer.apply_chat_template(messages, **options))
    except Exception as error:  # a template is a program of someone else's, in a sandbox
        raise ModelError(f"The chat template cannot write this prompt: {error}") from error


def continue_ids(
    model: nn.Module,
    ids: Sequence[int],
    *,
    max_tokens: int,
    stop: Collection[int],
    temperature: float = 0.0,
    seed: int = 0,
    timeout_s: float | None = None,
) -> list[int]:
    """Return at most `max_tokens` ids that `model` continues `ids` with, ending before one of `stop`.

    Temperature 0 takes the likeliest; above, tokens are drawn from a key made of `seed`, not from MLX's global state.
    The clock is read between tokens: after `timeout_s` seconds what there is so far is returned.
    """
    with quiet_imports():
        from mlx_lm.generate import generate_step
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    sampler = categorical(temperature, seed) if temperature > 0 else None
    answer: list[int] = []
    # Closed by hand: while it waits, mlx-lm's generator holds its own stream as the default one.
    with closing(generate_step(mx.array(list(ids)), model, max_tokens=max_tokens, sampler=sampler)) as steps:
        for token, _ in steps:
            if token in stop:
                break
            answer.append(int(token))
            if deadline is not None and time.monotonic() >= deadline:
                break
    return answer


def categorical(temperature: float, seed: int) -> Sampler:
    """Return a sampler of log-probabilities (rows, vocabulary) with its own sequence of keys."""
    key = mx.random.key(seed)

    def sample(log_probabilities: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        return mx.random.categorical(log_probabilities / temperature, key=now)

    return sample


def stop_ids(tokenizer: Any, settings: Mapping[str, Any]) -> set[int]:
    """Return the ids that end an answer: the tokenizer's, and those of the model's configuration (one or a list)."""
    named = settings.get("eos_token_id")
    listed = named if isinstance(named, list) else [named]
    return {id_ for id_ in [tokenizer.eos_token_id, *listed] if id_ is not None}
