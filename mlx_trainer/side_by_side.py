"""The parts of a micro-batch on two of MLX's CPU streams, each of which has a thread of its own.

On a CPU MLX computes a stream's operations one after the other, on one thread, and only products of matrices could use
another core. Halves of a batch are independent up to the sum of their gradients.

What they do at the same time depends on the order in which their operations are queued. The host queues about a hundred
ahead, of all streams together (mlx 0.32.4), and takes the order from the results that it is asked for: with many at
once it goes deep into one half before it begins the other, whose stream has nothing to do meanwhile. Asked for a few
gradients at a time, the last layers' first, it queues both halves in step. Order and timing decide on no number.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_trainer import _blas, runtime
from mlx_trainer.failure import dispatched
from mlx_trainer.traced import Gradients, leaves

AT_ONCE = 4
"""So many gradients are asked for at once; 1 to 8 are alike, and from 14 on each half waits for the other."""


def streams() -> list[Any]:
    """Return the streams to compute on; None is the default one.

    Two on Linux where there are two CPUs or more and BLAS has one thread, as it has by itself on two; where it has
    several, they would be in each other's way. Else one.
    """
    two = runtime.linux_cpu() and runtime.available_cpus() > 1 and _blas.threads_used == 1
    return [None, second_stream()] if two else [None]


@cache
def second_stream() -> Any:
    """Return the same stream each time, since its thread never ends; a thread that computes has one of its own."""
    return mx.new_thread_local_stream(mx.cpu)


def on(stream: Any) -> AbstractContextManager[Any]:
    """Return what makes `stream` the default one inside."""
    return nullcontext() if stream is None else mx.stream(stream)


def dispatched_in_step(sums: Any, gradients: Gradients) -> None:
    """Dispatch the sums, and the gradients of all parts together, such that the parts' operations alternate."""
    last_first = leaves(gradients)[::-1]
    dispatched(sums, last_first[:AT_ONCE])
    for begin in range(AT_ONCE, len(last_first), AT_ONCE):
        dispatched(last_first[begin : begin + AT_ONCE])
