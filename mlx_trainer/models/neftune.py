"""NEFTune: uniform noise on the embeddings while training (https://arxiv.org/abs/2310.05914).

A row of L tokens gets noise within ±alpha / sqrt(L·d) on each of its (L, d) embeddings, from MLX's random state, so
that a resumed run draws what it would have drawn. As in the authors' code, L is the row's own length, its prompt
included and its padding not; transformers takes the padded length.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_trainer.models.error import ModelError

INPUTS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "token_embeddings",
    "embed_in",
    "embedding",
    "embeddings",
    "embed",
)
"""What mlx-lm's architectures call the layer that tokens enter by; the first that there is, is meant."""


@contextmanager
def noisy_embeddings(model: nn.Module, batch: Any, alpha: float | None) -> Iterator[None]:
    """Inside, `model` in training mode adds noise to the embeddings of `batch`; None, or eval mode, adds none.

    Only the class of the embedding changes, and comes back: no array of the model is touched, and a tied head, which
    uses the same weight, has no noise. Costs one draw and one sum of the embeddings' size, and no memory for gradients.
    Raises ModelError where the model's embedding is not known.
    """
    if alpha is None or not model.training:
        yield
        return
    embedding, lengths = input_embedding(model), row_lengths(batch)
    kind: Any = type(embedding)

    def call(self: Any, ids: mx.array) -> mx.array:
        return noisy(kind.__call__(self, ids), lengths, alpha)

    embedding.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        yield
    finally:
        embedding.__class__ = kind


def noisy(embedded: mx.array, lengths: mx.array, alpha: float) -> mx.array:
    """`embedded` (…, d) with uniform noise within ±alpha / sqrt(L·d), L being the `lengths`, which broadcast to it."""
    bound = alpha * mx.rsqrt(mx.maximum(lengths, 1) * embedded.shape[-1])
    draw = mx.random.uniform(-1.0, 1.0, embedded.shape)
    return embedded + (bound * draw).astype(embedded.dtype)


def row_lengths(batch: Any) -> mx.array:
    """The tokens of the row that each embedding belongs to: (rows, 1, 1) of a padded batch, (positions, 1) unpadded."""
    if hasattr(batch, "cells"):
        return unpadded_lengths(batch)[:, None]
    lengths: mx.array = batch.attention_mask.sum(axis=1)
    return lengths[:, None, None]


def unpadded_lengths(batch: Any) -> mx.array:
    """The same for an unpadded batch, (positions,).

    Where rows share a prefix it is computed once, so its noise is drawn once, for all of them, with their mean length:
    a draw for each row would compute it for each row again. A row followed by a single position of padding, which
    cannot be told from its own, counts that too.
    """
    follows = batch.grid[:, 1:] == batch.grid[:, :-1] + 1  # beyond a row's end stands the last position again and again
    rows = batch.prefix + 1 + follows.sum(axis=1)
    lengths: mx.array = rows[batch.cells // batch.grid.shape[1]]
    if not batch.groups:
        return lengths
    shared = rows.reshape(batch.groups, -1).mean(axis=1)
    return mx.concatenate([mx.repeat(shared, batch.prefix), lengths])


def input_embedding(model: nn.Module) -> nn.Module:
    """The layer that turns tokens into embeddings; raises ModelError where none has a known name."""
    by_name: dict[str, nn.Module] = {path.rpartition(".")[2]: module for path, module in model.named_modules()}
    for name in INPUTS:
        if name in by_name:
            return by_name[name]
    raise ModelError(f"neftune_noise_alpha: no layer of this model is called {' or '.join(INPUTS)}; leave it out.")
