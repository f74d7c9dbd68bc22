"""Noise on the embeddings: how large it is in each layout, where there is none, and that nothing else changes."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.models.neftune import noisy_embeddings, row_lengths
from mlx_trainer.traced import from_tree, to_tree
from tests.models.batches import labelled
from tests.models.test_causal_lm import arrays, changed, module_in, train
from tests.models.test_shared_prefixes import shape_of, sharing_rows
from tests.models.test_unpadded import ROWS, module_of, rows_of
from tests.tiny import tiny_mistral

ALPHA, HIDDEN = 5.0, 64


def ready(batch: Any) -> Any:
    """As the compiled step sees it."""
    return from_tree(to_tree(batch))


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> CausalLMModule:
    """A tiny Mistral without dropout, all its adapters at work."""
    folder = tiny_mistral(tmp_path_factory.mktemp("model"))
    found = module_of(folder, lora=LoRAConfig(rank=4, dropout=0.0), neftune_noise_alpha=ALPHA)
    found.model.train()
    return found


def noise(module: CausalLMModule, batch: Any) -> np.ndarray[Any, Any]:
    """What is added to each embedding of a batch, (…, hidden)."""
    embedding = module.model.model.embed_tokens
    with noisy_embeddings(module.model, batch, ALPHA):
        noisy = embedding(batch.input_ids)
    return np.array(noisy - embedding(batch.input_ids))


def assert_within(added: np.ndarray[Any, Any], lengths: Any) -> None:
    """The noise fills ±alpha / sqrt(L·d), L given for each of its rows (n, hidden), evenly."""
    bounds = ALPHA / np.sqrt(np.asarray(lengths) * HIDDEN)
    share = added / bounds[:, None]
    assert 0.98 < np.abs(share).max() <= 1 + 1e-4
    assert abs(share.mean()) < 0.05
    assert share.std() == pytest.approx(3**-0.5, abs=0.03)


def test_a_padded_rows_noise_is_that_of_its_own_length(module: CausalLMModule) -> None:
    """Each row by its tokens, prompt included and padding not."""
    batch = ready(collate(ROWS, Shape(5, 14, 70)))
    added = noise(module, batch)
    for row, length in enumerate([7, 1, 12, 12]):
        each = added[row, :length]
        assert_within(each, [length] * len(each)) if length > 1 else None
    assert np.isfinite(added).all()


def test_an_unpadded_rows_noise_is_that_of_its_own_length(module: CausalLMModule) -> None:
    """The same where all rows stand one behind the other."""
    batch = ready(collate_unpadded(ROWS, Shape(5, 14, 40), 30))
    own = np.repeat([7, 1, 12, 12], [7, 1, 12, 12])
    assert np.array(row_lengths(batch))[:32, 0].tolist() == own.tolist()
    assert_within(noise(module, batch)[:32], own)


@pytest.mark.parametrize(("spare", "last"), [(0, 9), (1, 10), (2, 9)])
def test_one_position_of_padding_counts_to_the_last_row(spare: int, last: int) -> None:
    """It cannot be told from the row's own; any other number of them can."""
    rows = rows_of([4, 9], [[True] * 3, [True] * 8], 0)
    lengths = row_lengths(ready(collate_unpadded(rows, Shape(2, 10, 13 + spare), 20)))
    assert np.array(lengths)[:13, 0].tolist() == [4] * 4 + [last] * 9


def test_a_shared_prefix_has_one_draw_of_its_rows_mean_length(module: CausalLMModule) -> None:
    """Each row's own tokens have the noise of the whole row, prefix included."""
    own, prefix = [3, 9, 5, 5], 6
    batch = ready(collate_unpadded(sharing_rows(own, prefix, 2, 0), shape_of(own, prefix, 2, 2, 3), 40))
    expected = [12.0] * 6 + [11.0] * 6 + [n + 6.0 for n in own for _ in range(n)]
    assert np.array(row_lengths(batch))[: len(expected), 0].tolist() == expected
    assert_within(noise(module, batch)[: len(expected)], expected)


@pytest.mark.parametrize("unpadded", [False, True])
def test_training_has_noise_and_evaluation_has_none(module: CausalLMModule, unpadded: bool) -> None:
    """The training loss differs from draw to draw, by MLX's random state; without alpha, and in eval mode, not."""
    batch = ready(collate_unpadded(ROWS, Shape(4, 12, 40), 30) if unpadded else collate(ROWS, Shape(4, 12, 48)))

    def losses() -> list[float]:
        mx.random.seed(3)
        return [module.training_loss(batch).total.item() for _ in range(2)]

    first, again = losses(), losses()
    module.neftune_noise_alpha = None
    plain = losses()
    module.model.eval()
    quiet = losses()
    module.neftune_noise_alpha = ALPHA
    quiet_too = losses()
    module.model.train()
    assert first == again
    assert first[0] != first[1]
    assert plain[0] == plain[1] not in first
    assert quiet == quiet_too == pytest.approx(plain, rel=1e-6)


def test_noise_leaves_generation_and_the_saved_layers_alone(tmp_path: Path) -> None:
    """After training the embedding is bit for bit what it was, and of its own class again, also after an error."""
    module = module_in(tiny_mistral(tmp_path), neftune_noise_alpha=ALPHA)
    before, kind = arrays(module), type(module.model.model.embed_tokens)
    train(module, 2)
    assert {name.rpartition(".")[2] for name in changed(before, module)} == {"lora_a", "lora_b"}
    assert module.generate(["hello"], max_tokens=4) == module.generate(["hello"], max_tokens=4)
    with pytest.raises(AttributeError):
        module.training_loss(object())
    assert type(module.model.model.embed_tokens) is kind


@pytest.mark.parametrize("bits", [None, 4])
def test_a_tied_head_has_no_noise(tmp_path: Path, bits: int | None) -> None:
    """Packed or not, only what enters is noisy."""
    module = module_in(tiny_mistral(tmp_path, tied=True, bits=bits))
    embedding, states = module.model.model.embed_tokens, mx.random.normal((5, HIDDEN))
    expected = embedding.as_linear(states)
    with noisy_embeddings(module.model, labelled(), ALPHA):
        assert mx.array_equal(embedding.as_linear(states), expected).item()


def test_a_model_without_a_known_embedding_is_told() -> None:
    """The error says which names are known."""
    with (
        pytest.raises(ModelError, match="no layer of this model is called embed_tokens or wte"),
        noisy_embeddings(nn.Sequential(nn.Linear(2, 2)), labelled(), ALPHA),
    ):
        pass
