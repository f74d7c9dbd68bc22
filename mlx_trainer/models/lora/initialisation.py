"""Where the adapters of linear layers start, if not at random: at parts of the weight that they adapt.

The base weight stays as it is, packed or not. The start is taken off again by a frozen copy beside the adapter
(`LoRALinear.start_at`), so that the layer starts at its base's output, and what is saved is a LoRA of twice the rank.
"""

import mlx.core as mx

from mlx_trainer.models.lora.layers import LoRALinear, dense_weight, rank_of

OVERSAMPLING = 16
ITERATIONS = 4


def start(layer: LoRALinear, kind: str, key: mx.array) -> None:
    """Let the adapter of `layer` start as `kind` says, "pissa" or "olora"; lazy: what a file replaces costs nothing."""
    weight = dense_weight(layer.linear)
    if kind == "pissa":
        layer.start_at(*pissa(weight, rank_of(layer), layer.scale, key))
    else:
        layer.start_at(*olora(weight, rank_of(layer)))


def pissa(weight: mx.array, rank: int, scale: float, key: mx.array) -> tuple[mx.array, mx.array]:
    """Return a (in, rank) and b (rank, out) with `scale · (a b)ᵀ` = U S Vᵀ, the largest part of `weight` (out, in).

    Equations 2 and 3 of https://arxiv.org/abs/2404.02948, with its fast singular value decomposition.
    """
    left, values, right = largest_part(weight, rank, key)
    roots = mx.sqrt(values / scale)
    return right.T * roots, roots[:, None] * left.T


def olora(weight: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    """Return a (in, rank) and b (rank, out) with `(a b)ᵀ` = Q R, the first `rank` columns and rows of QR = `weight`.

    Algorithm 1 of https://arxiv.org/abs/2406.01775. Q's first columns are those of the weight's first columns alone.
    """
    columns = columns_of(weight[:, :rank])
    return weight.T @ columns, columns.T


def largest_part(weight: mx.array, rank: int, key: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return U (out, rank), S (rank,) and Vᵀ (rank, in) of the `rank` largest singular values of `weight`.

    Of a large weight by subspace iteration (algorithms 4.4 and 5.1 of https://arxiv.org/abs/0909.4061), a few products
    with rank + 16 columns: the whole decomposition of a 1024 x 1024 weight takes longer than this of 4096 x 4096.
    """
    width = rank + OVERSAMPLING
    if 4 * width >= min(weight.shape):
        left, values, right = mx.linalg.svd(weight, stream=mx.cpu)
        return left[:, :rank], values[:rank], right[:rank]
    basis = columns_of(weight @ mx.random.normal((weight.shape[1], width), key=key))
    for _ in range(ITERATIONS):
        basis = columns_of(weight @ columns_of(weight.T @ basis))
    rows, triangle = mx.linalg.qr(weight.T @ basis, stream=mx.cpu)  # so that the decomposition is of (width, width)
    left, values, right = mx.linalg.svd(triangle.T, stream=mx.cpu)
    return (basis @ left)[:, :rank], values[:rank], (right @ rows.T)[:rank]


def columns_of(matrix: mx.array) -> mx.array:
    """Orthonormal columns that span those of a tall `matrix`."""
    return mx.linalg.qr(matrix, stream=mx.cpu)[0]
