"""Sums of low-rank updates, and the nearest update of a lower rank: NumPy on one layer, in float64 where factors do.

An update of (rows, columns) is a pair of factors (rows, rank) and (rank, columns).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen

Matrix = np.ndarray[Any, np.dtype[np.floating[Any]]]
Factors = tuple[Matrix, Matrix]
FLOAT32 = 2.0**-23
"""Singular values below this share of all terms together are rounding."""


@frozen
class Fit:
    """Factors `a` (rows, rank) and `b` (rank, columns) of an update of norm `size`, from which they are `lost` off."""

    a: Matrix
    b: Matrix
    size: float
    lost: float = 0.0


def cat(terms: Sequence[Factors]) -> Fit:
    """Σ a_i b_i exactly: the factors stand beside each other."""
    a, b = side_by_side(terms)
    return Fit(a, b, size=float(np.linalg.norm(spectrum(a, b)[1])))


def linear(terms: Sequence[Factors]) -> Fit:
    """Σ a_i b_i exactly, up to float32's rounding, with the smallest rank that holds it."""
    u, s, v = spectrum(*side_by_side(terms))
    rounding = FLOAT32 * sum(float(np.linalg.norm(spectrum(*term)[1])) for term in terms)
    return truncated(u, s, v, max(int((s > rounding).sum()), 1))


def svd(terms: Sequence[Factors], rank: int) -> Fit:
    """The nearest of `rank` to Σ a_i b_i in the Frobenius norm, which is never formed."""
    return truncated(*spectrum(*side_by_side(terms)), rank)


def ties(terms: Sequence[Factors], rank: int, density: float) -> Fit:
    """The nearest of `rank` to the terms trimmed to their largest values, of one sign each, averaged.

    https://arxiv.org/abs/2306.01708, layer by layer. The sign is that of the sum of the weighted terms, so that one
    with a negative weight votes against what it is. Forms each term: an SVD of (rows, columns) follows.
    """
    trimmed = [trim(delta, density) for delta in dense(terms)]
    elected = np.sign(sum(trimmed))
    agreeing = [np.where(np.sign(delta) == elected, delta, 0) for delta in trimmed]
    voters = sum((delta != 0).astype(np.float32) for delta in agreeing)
    return nearest(sum(agreeing) / np.maximum(voters, 1), rank)


def dare(terms: Sequence[Factors], rank: int, density: float, generator: np.random.Generator) -> Fit:
    """The nearest of `rank` to the sum of terms of which each value is kept with chance `density`, and divided by it.

    https://arxiv.org/abs/2311.03099. Forms each term: an SVD of (rows, columns) follows.
    """
    kept = [np.where(generator.random(delta.shape) < density, delta / density, 0) for delta in dense(terms)]
    return nearest(sum(kept), rank)


def side_by_side(terms: Sequence[Factors]) -> Factors:
    """Return the factors of the sum."""
    return np.concatenate([a for a, _ in terms], axis=1), np.concatenate([b for _, b in terms])


def dense(terms: Sequence[Factors]) -> list[Matrix]:
    """Return each update itself, (rows, columns) in float32, as large as the layer's weight."""
    return [a.astype(np.float32) @ b.astype(np.float32) for a, b in terms]


def trim(delta: Matrix, density: float) -> Matrix:
    """Return `delta` with 0 in place of all but so large a share of its values, the largest; one stays at least."""
    sizes = np.abs(delta)
    keep = max(int(density * delta.size), 1)
    return np.where(sizes >= np.partition(sizes, -keep, axis=None)[-keep], delta, 0)


def spectrum(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Return the singular value decomposition of `a @ b` through QR of both factors, which costs rank² · rows."""
    rows, left = np.linalg.qr(a)
    columns, right = np.linalg.qr(b.T)
    u, s, v = np.linalg.svd(left @ right.T)
    return rows @ u[:, : len(s)], s, v[: len(s)] @ columns.T


def nearest(delta: Any, rank: int) -> Fit:
    """Return the nearest of `rank` to a dense update."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return truncated(u, s, v, rank)


def truncated(u: Matrix, s: Matrix, v: Matrix, rank: int) -> Fit:
    """Return the largest `rank` parts of a decomposition, each factor with the root of the singular values."""
    root = np.sqrt(s[:rank])
    size, lost = float(np.linalg.norm(s)), float(np.linalg.norm(s[rank:]))
    return Fit(u[:, :rank] * root, root[:, None] * v[:rank], size, lost)
