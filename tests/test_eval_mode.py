"""Eval mode for a while: nothing is dropped inside, and the former mode comes back."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_trainer.eval_mode import eval_mode


@pytest.mark.parametrize("training", [True, False])
def test_the_former_mode_comes_back_even_after_an_error(training: bool) -> None:
    """Of every layer, whether the model was in training mode or not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(training)
    inside: list[bool] = []

    def fail_in_eval_mode() -> None:
        with eval_mode(model):
            inside.extend(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_eval_mode()
    assert inside == [False] * 3
    assert [module.training for module in model.modules()] == [training] * 3


def test_a_new_layer_in_a_model_in_eval_mode_drops_nothing() -> None:
    """A layer begins in training mode, as mlx-lm's adapters do when they are put into a loaded model."""
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    model.layers.append(nn.Dropout(0.5))
    with eval_mode(model):
        assert mx.array_equal(model.layers[1](mx.ones(1000)), mx.ones(1000))
