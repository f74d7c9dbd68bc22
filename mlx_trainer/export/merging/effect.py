"""How much of an adapter's effect a merged model has lost, seen in its logits.

Weights stay in the type of their files, activations are float32: what differs is then the weights alone. In float16
activations the rounding of a forward pass would hide the effect of a small adapter.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from mlx_trainer.export.checking import logits_of, share
from mlx_trainer.export.mlx_layout import opened_by_mlx_lm
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.loading import load_model, load_tokenizer

Rows = Sequence[Sequence[int]]
MAX_TOKENS = 1024
"""Of all rows together: their logits, three times, are held in memory."""
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and nobody knows why.",
    "Question: What is the capital of France?\nAnswer: The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n",
    "Dear Sir or Madam, thank you for your letter of the third of May.",
    "In 1969, two people walked on the moon; 600 million watched.",
    "Wer anderen eine Grube gräbt, fällt selbst hinein.",
    '{"name": "Ada", "born": 1815, "wrote": ["notes", "letters"]}',
    "User: Please sum this up in one sentence.\nAssistant: It works, but slowly.",
)
"""What the effect is measured on where nothing else is given: prose, a dialogue, code, numbers."""


@frozen
class Effect:
    """Logits on all rows, (tokens, vocabulary), of the base alone and of the base with the adapter on it."""

    base: mx.array
    adapted: mx.array

    @property
    def size(self) -> float:
        """‖adapted - base‖ / ‖base‖."""
        return share(self.adapted - self.base, self.base)

    def lost(self, merged: mx.array) -> float:
        """‖merged - adapted‖ / ‖adapted - base‖: 0 where nothing is lost, 1 where as much as there was.

        Infinite where the adapter changes nothing on these rows, unless the merged model does not either.
        """
        return share(merged - self.adapted, self.adapted - self.base)


def sentence_rows(directory: Path, texts: Sequence[str] = SENTENCES) -> Rows:
    """Return `texts` as token ids of the tokenizer in `directory`."""
    tokenizer = load_tokenizer(directory)
    return [tokenizer.encode(text) for text in texts]


def measure_effect(base: Path, adapter: Path, rows: Rows, *, trust_remote_code: bool = False) -> Effect:
    """Return what the adapter, in mlx-lm's layout, changes in the logits; the base is loaded for that and let go.

    mlx-lm's own layers compute it, not the formula by which the adapter is merged. Raises ModelError.
    """
    model = load_model(base, dtype=None, trust_remote_code=trust_remote_code)
    alone = wide_logits(model, rows)
    return Effect(alone, wide_logits(opened_by_mlx_lm(model, adapter), rows))


def measure_logits(directory: Path, rows: Rows, *, trust_remote_code: bool = False) -> mx.array:
    """Return the logits of the model in `directory`, which is loaded for that and let go."""
    return wide_logits(load_model(directory, dtype=None, trust_remote_code=trust_remote_code), rows)


def wide_logits(model: nn.Module, rows: Rows) -> mx.array:
    """Return the logits on all rows, (tokens, vocabulary), of at most MAX_TOKENS tokens, with float32 activations."""
    widen(model)
    logits, left = [], MAX_TOKENS
    for row in rows:
        if ids := list(row[:left]):
            logits.append(logits_of(model, mx.array([ids]))[0])
            left -= len(ids)
    if not logits:
        raise ModelError("There is no row to measure the adapter's effect on; give other data.")
    together = mx.concatenate(logits)
    mx.eval(together)
    return together


def widen(model: nn.Module) -> None:
    """Let the embeddings of `model` give float32, which every later layer then computes in."""
    wide: dict[type, type] = {nn.Embedding: Float32Embedding, nn.QuantizedEmbedding: Float32QuantizedEmbedding}
    for module in model.modules():
        module.__class__ = wide.get(type(module), type(module))


class Float32Embedding(nn.Embedding):
    """An embedding whose result is float32, whatever its weight is."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows `ids` of the weight."""
        return super().__call__(ids).astype(mx.float32)  # type: ignore[no-any-return, no-untyped-call]


class Float32QuantizedEmbedding(nn.QuantizedEmbedding):
    """A packed embedding whose result is float32."""

    def __call__(self, ids: mx.array) -> mx.array:
        """Return the rows `ids` of the weight."""
        return super().__call__(ids).astype(mx.float32)  # type: ignore[no-any-return, no-untyped-call]
