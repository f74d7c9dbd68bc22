"""What the machine could do at most: its own matrix products, timed, and what a token needs of them."""

import math
import time
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from mlx_trainer import runtime
from mlx_trainer.benchmarking.clock import Clock
from mlx_trainer.models.loading import DTYPES
from mlx_trainer.models.lora import dimensions, linear_layers
from mlx_trainer.side_by_side import streams

SIZES: Mapping[runtime.Backend, int] = {"cpu": 1024, "metal": 4096, "cuda": 8192}
SECONDS, FEWEST = 1.0, 5

PASSES = {"lora": 4, "full": 6, "dpo": 6, "orpo": 4}
"""FLOP for a token and a weight: 2 forward, 2 backward to the activations and, where it trains, 2 to the weight.

DPO's reference is 2 more, in each step unless it was computed before.
"""


@frozen
class MatmulRate:
    """The best of several times for products of square matrices, (size, size), in FLOP/s."""

    dtype: str
    size: int
    flop_per_s: float


@frozen
class Ceiling:
    """The limit that matrix products set: `limit_tokens_per_s` = rate / `flop_per_token`.

    `weights` are the parameters of the linear layers that each token goes through, `head_weights` those that only a
    token with a prediction needs. `share` is the limit's share that the real tokens reach; `computed_share` counts
    padding as tokens, and tells how well the device is used.
    """

    rate: MatmulRate
    weights: int
    head_weights: int
    flop_per_weight: int
    flop_per_token: float
    limit_tokens_per_s: float
    share: float
    computed_share: float


def matmul_rate(dtype: str, now: Clock = time.perf_counter) -> MatmulRate:
    """Time products of large matrices for about a second, as many at once as a step has streams.

    Their size suits the device.
    """
    size = SIZES[runtime.backend()]
    a, b = (mx.random.normal((size, size)).astype(DTYPES[dtype]) for _ in range(2))

    together = streams()

    def products() -> list[mx.array]:
        return [mx.matmul(a, b, stream=stream) for stream in together]

    mx.eval(a, b, products())  # the first one builds the kernel
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < SECONDS:
        start = now()
        mx.eval(products())
        times.append(now() - start)
    return MatmulRate(dtype, size, len(together) * 2 * size**3 / min(times))


def weights_passed(model: nn.Module) -> tuple[int, int] | None:
    """Return the parameters of the linear layers, and of the head, that a token goes through; adapters do not count.

    A tied head is the embedding. None for a mixture of experts, where the router decides.
    """
    modules = dict(model.named_modules())
    if any(getattr(module, "weight", mx.array(0)).ndim > 2 for module in modules.values()):
        return None
    sizes = {path: math.prod(dimensions(layer)) for path, layer in linear_layers(model).items()}
    head = sum(size for path, size in sizes.items() if "lm_head" in path.split("."))
    tied = [module for module in modules.values() if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]
    body = sum(sizes.values()) - head
    return body, head or (embedding_size(tied[0]) if tied else 0)


def embedding_size(layer: Any) -> int:
    """Return how many parameters an embedding has, packed ones counted as what they stand for."""
    size: int = layer.weight.size
    return size * 32 // layer.bits if isinstance(layer, nn.QuantizedEmbedding) else size


def ceiling(
    rate: MatmulRate,
    weights: tuple[int, int],
    method: str,
    *,
    tokens_per_s: float,
    trained_tokens_per_s: float,
    positions_per_s: float,
) -> Ceiling:
    """Compare speeds with what the matmul rate allows."""
    body, head = weights
    flop = PASSES[method] * (body + head * trained_tokens_per_s / tokens_per_s)
    limit = rate.flop_per_s / flop
    return Ceiling(rate, body, head, PASSES[method], flop, limit, tokens_per_s / limit, positions_per_s / limit)
