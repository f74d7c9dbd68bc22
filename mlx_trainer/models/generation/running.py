"""Tokens for answers: one by one for a single answer, several at once with mlx-lm's batches."""

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.models.generation.answer import Answer
from mlx_trainer.models.libraries import quiet_imports

BATCHED = frozenset(
    (
        *("cohere2", "deepseek_v2", "deepseek_v3", "gemma3", "gemma3_text", "glm4", "granite", "llama", "ministral3"),
        *("mistral", "mistral3", "mixtral", "olmo2", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        *("smollm3", "stablelm"),
    )
)
"""Model types of which a test shows that several answers at once are those of each alone, with mlx-lm 0.32.2.

Others answer one prompt after the other. Gemma 2 must: its mask has another shape than its scores in a batch.
"""


def complete(model: nn.Module, answers: Sequence[Answer]) -> None:
    """Let `model` answer until each has ended, all at once where that is known to be exact (`BATCHED`).

    mlx-lm's batch is padded, so floating-point sums differ in their last digits from those of an answer alone: two
    tokens that are equally likely to that precision may then change places.
    """
    if len(answers) > 1 and model.model_type in BATCHED:
        together(model, answers)
    else:
        for answer in answers:
            for _ in pieces(model, answer):
                pass


def pieces(model: nn.Module, answer: Answer) -> Generator[Answer, None, None]:
    """Give `answer` one token after the other, and yield it after each."""
    with quiet_imports():
        from mlx_lm.generate import generate_step
    answer.begin()
    # On the current stream: a stream of its own would stay the default one while the generator waits.
    steps = generate_step(
        mx.array(list(answer.prompt)),
        model,
        mx.default_stream(mx.default_device()),
        max_tokens=answer.limit,
        sampler=answer.sampler,
        logits_processors=list(answer.processors),
    )
    with closing(steps):
        for token, _ in steps:
            answer.take(int(token))
            yield answer
            if answer.ended:
                return


def together(model: nn.Module, answers: Sequence[Answer]) -> None:
    """Let `model` answer all at once; an answer that has ended leaves the batch."""
    with quiet_imports():
        from mlx_lm.generate import BatchGenerator
    size = len(answers)
    for answer in answers:
        answer.begin()
    generator: Any = BatchGenerator(model, completion_batch_size=size, prefill_batch_size=size)
    with closing(generator):
        numbers = generator.insert(
            [list(answer.prompt) for answer in answers],
            max_tokens=[answer.limit for answer in answers],
            samplers=[answer.sampler for answer in answers],
            logits_processors=[list(answer.processors) for answer in answers],
        )
        rows = dict(zip(numbers, answers, strict=True))
        while responses := generator.next_generated():
            for response in responses:
                rows[response.uid].take(int(response.token))
            generator.remove([r.uid for r in responses if rows[r.uid].ended and r.finish_reason is None])
