"""How a run fails: its own error, and a backend that has no memory left."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

logger = logging.getLogger(__name__)

OUT_OF_MEMORY = ("malloc", "out of memory", "insufficient memory", "unable to allocate")
"""What MLX's backends say, in small letters."""
COMPILER_KILLED = "could not load c++ shared library"
"""What mlx 0.32.4 says on a CPU where the compiler that it calls is killed, as by a Ctrl-C in the terminal."""

LARGE = 1 << 30
"""From so many bytes in arrays on, what earlier runs left is looked for."""


class TrainingError(RuntimeError):
    """Training cannot go on, for instance because its numbers stay non-finite."""


def dispatched(*trees: Any) -> None:
    """`mx.async_eval`, a second time where the backend had no memory, MLX's cache given back before.

    What is lazy keeps the graph that makes it, so the second try needs no reference to older arrays, which would stand
    in the way of MLX's reusing their memory. It can only be tried here: an error that comes while a step is waited for
    has spoiled arrays that the next step was already given.
    """
    try:
        mx.async_eval(*trees)
    except RuntimeError as error:
        if not (is_out_of_memory(error) or COMPILER_KILLED in str(error).lower()):
            raise
        logger.warning("a step could not be dispatched, trying once more: %s", error)
        mx.clear_cache()
        mx.async_eval(*trees)


def forget_earlier_runs() -> None:
    """Free what earlier runs in this process left, where arrays are large.

    A trainer, its step and its module refer to each other, and Python looks for such circles by the number of objects,
    not by their size: a second base model would stand beside the first.
    """
    if mx.get_active_memory() >= LARGE:
        gc.collect()


@contextmanager
def memory_explained(step: int) -> Iterator[None]:
    """Turn MLX's RuntimeError for want of memory into a TrainingError that says what to change."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"no memory was left for step {step} ({error}): a smaller batch_tokens or batch_size, a lower "
            "max_seq_length or recompute needs less; resume from the newest checkpoint"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a backend says that it could not allocate."""
    return any(words in str(error).lower() for words in OUT_OF_MEMORY)
