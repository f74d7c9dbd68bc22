"""The module as the trainer uses it: what it loads when, what its loss sees, what trains, what generation leaves."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from attrs import evolve
from mlx.utils import tree_flatten

from mlx_trainer.config import LoRAConfig
from mlx_trainer.models.causal_lm import CausalLMModule
from mlx_trainer.models.error import ModelError
from mlx_trainer.models.generation import writer
from mlx_trainer.models.loading import load_model
from mlx_trainer.models.lora import trainable
from mlx_trainer.prompts import PromptEncoder
from tests.models.answers import continued
from tests.models.batches import Labelled, labelled
from tests.tiny import tiny_mistral

LORA = LoRAConfig(rank=4, alpha=8.0, dropout=0.2, target_modules=["q_proj", "v_proj"])


def module_in(directory: Path, **arguments: Any) -> CausalLMModule:
    """A module on a tiny model, ready to fit, with a constant learning rate that shows its effect."""
    settings = {"lora": LORA, "dtype": "float32", "learning_rate": 0.01, "warmup_steps": 0, "schedule": "constant"}
    module = CausalLMModule(directory, **{"max_seq_length": 64, **settings, **arguments})
    module.setup("fit")
    return module


def train(module: CausalLMModule, steps: int, between: Callable[[], object] = list) -> list[float]:
    """Train eagerly on two batches in turn; return the mean losses."""
    mx.random.seed(11)
    optimizer, losses = module.configure_optimizer(steps), []
    for number in range(steps):
        batch = labelled((9, 5, 7)) if number % 2 else labelled((4, 8), seed=1)
        loss, gradients = gradients_of(module, batch)
        optimizer.update(module.model, gradients)
        losses.append(loss / batch.metadata.trained_tokens)
        between()
    return losses


def gradients_of(module: CausalLMModule, batch: Labelled) -> tuple[float, dict[str, Any]]:
    """The summed loss of a batch, and its gradient as a tree."""
    loss, gradients = nn.value_and_grad(module.model, lambda _: module.training_loss(batch).total)(module.model)
    return loss.item(), gradients


def arrays(module: CausalLMModule) -> dict[str, mx.array]:
    """Copies of all parameters."""
    return {name: mx.array(value) for name, value in tree_flatten(module.model.parameters())}


def changed(before: dict[str, mx.array], module: CausalLMModule) -> set[str]:
    """The names of the parameters that are no longer bit for bit what they were."""
    return {name for name, value in arrays(module).items() if not mx.array_equal(value, before[name]).item()}


def test_construction_and_tokenizer_need_no_weights(tmp_path: Path) -> None:
    """A module of a name that does not exist is made; a tokenizer is there although the weights are gone."""
    assert CausalLMModule("nobody/nothing").artifact == "adapter"
    directory = tiny_mistral(tmp_path)
    (directory / "model.safetensors").unlink()
    module = CausalLMModule(directory)
    assert module.tokenizer is module.tokenizer
    with pytest.raises(ModelError, match="has no weights"):
        module.setup("fit")


def test_the_model_is_loaded_once_and_dropout_is_on_for_fit_only(tmp_path: Path) -> None:
    """setup is idempotent: the same model with the same adapters, in training mode for "fit" alone."""
    module = module_in(tiny_mistral(tmp_path))
    model, before = module.model, arrays(module)
    for stage, training in (("validate", False), ("fit", True), ("predict", False)):
        module.setup(stage)
        assert {part.training for part in module.model.modules()} == {training}
    assert module.model is model
    assert changed(before, module) == set()


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_training_moves_every_adapter_and_nothing_else(tmp_path: Path, bits: int | None, dtype: str) -> None:
    """After a few steps the loss is lower, all adapters moved, and the base, packed or not, is bit-identical."""
    module = module_in(tiny_mistral(tmp_path, bits=bits), dtype=dtype)
    before = arrays(module)
    losses = train(module, 12)
    assert changed(before, module) == set(trainable(module.model))
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])


def test_full_mode_trains_everything(tmp_path: Path) -> None:
    """With `lora=None` every parameter moves and the result is a model."""
    module = module_in(tiny_mistral(tmp_path), lora=None)
    before = arrays(module)
    train(module, 2)
    assert changed(before, module) == set(before)
    assert module.artifact == "model"


def test_padding_content_influences_nothing(tmp_path: Path) -> None:
    """Loss and gradients are the same to the bit whatever ids stand in the padding."""
    module, results = module_in(tiny_mistral(tmp_path), lora=evolve(LORA, dropout=0.0)), []
    train(module, 1)  # so that lora_b is not 0 and lora_a has a gradient
    for padding in (0, 377):
        batch = labelled((9, 5, 7), padding=padding)
        total, gradients = gradients_of(module, batch)
        results.append((total, dict(tree_flatten(gradients))))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        assert mx.array_equal(gradient, results[1][1][name]).item(), name
        assert mx.abs(gradient).max().item() > 0, name


def test_rows_are_independent_of_their_neighbours(tmp_path: Path) -> None:
    """A batch's loss is the sum of its rows' losses, each computed alone and without padding."""
    module, batch = module_in(tiny_mistral(tmp_path)), labelled((9, 5, 7))
    module.setup("validate")
    alone = 0.0
    for row, length in enumerate((9, 5, 7)):
        part = Labelled(
            *(array[row : row + 1, :length] for array in (batch.input_ids, batch.attention_mask, batch.labels))
        )
        alone += module.training_loss(part).total.item()
    assert module.training_loss(batch).total.item() == pytest.approx(alone, rel=1e-6)


def test_accuracy_is_computed_in_eval_mode_only(tmp_path: Path) -> None:
    """Training is spared the argmax; validation reports the sum of right first guesses."""
    module, batch = module_in(tiny_mistral(tmp_path)), labelled()
    assert module.training_loss(batch).metrics == {}
    module.setup("validate")
    guesses = np.array(mx.argmax(module.predict(batch), axis=-1))[:, :-1]
    labels = np.array(batch.labels)[:, 1:]
    right = int(((guesses == labels) & (labels >= 0)).sum())
    assert module.validation_loss(batch).metrics["token_accuracy"].item() == right


def test_count_tells_rows_and_tokens(tmp_path: Path) -> None:
    """The host-side sizes are the metadata's."""
    assert CausalLMModule(tmp_path).count(labelled((9, 5, 7))) == {
        "rows": 3,
        "tokens": 21,
        "trained_tokens": 12,
        "positions": 27,
    }


def test_the_optimizer_is_the_one_described(tmp_path: Path) -> None:
    """Name, rate, schedule, warm-up and decay reach the optimizer."""
    module = CausalLMModule(
        tmp_path, optimizer="lion", learning_rate=0.5, schedule="linear", warmup_steps=4, weight_decay=0.25
    )
    optimizer = module.configure_optimizer(10)
    assert (type(optimizer).__name__, optimizer.weight_decay) == ("Lion", 0.25)
    rates = [optimizer._schedulers["learning_rate"](mx.array(step)).item() for step in (0, 3, 7)]
    assert rates == pytest.approx([0.125, 0.5, 0.25])


def test_training_continues_bit_for_bit_after_generation(tmp_path: Path) -> None:
    """Sampling between steps with dropout changes neither a loss nor a parameter of the run."""
    directory = tiny_mistral(tmp_path)
    undisturbed, disturbed = module_in(directory), module_in(directory)
    prompts = ["Where is it?", "And the fox?"]
    expected = train(undisturbed, 4)
    actual = train(disturbed, 4, between=lambda: disturbed.generate(prompts, max_tokens=5, temperature=1.0))
    assert actual == expected
    assert changed(arrays(undisturbed), disturbed) == set()


@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_generation_restores_the_mode_even_when_it_fails(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model generates in eval mode, and is afterwards in the mode it was in."""
    module, seen = module_in(tiny_mistral(tmp_path)), []
    module.setup(stage)

    def fail(model: nn.Module, *args: object, **kwargs: object) -> list[int]:
        seen.append(model.training)
        raise RuntimeError("no memory")

    monkeypatch.setattr(writer, "complete", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        module.generate(["hello"])
    assert (seen, module.model.training) == ([False], stage == "fit")


def test_answers_are_text_within_the_longest_length(tmp_path: Path) -> None:
    """A prompt and its answer share `max_seq_length`; a prompt that fills it is refused with both numbers."""
    module = module_in(tiny_mistral(tmp_path), max_seq_length=20)
    ids = PromptEncoder.of(module.tokenizer).encode("hello")
    short, long = module.generate(["hello"], max_tokens=3), module.generate(["hello"], max_tokens=500)
    decode = module.tokenizer.decode
    for answer, tokens in ((short, 3), (long, 20 - len(ids))):
        module.model.eval()
        whole = continued(module.model, ids, tokens, stop_ids={2})
        assert answer == [decode(whole, skip_special_tokens=True).strip()]
    with pytest.raises(ModelError, match=r"A prompt has \d+ tokens; max_seq_length is 20\."):
        module.generate(["hello " * 20])


def test_a_length_beyond_the_models_positions_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asking for longer rows than the model knows positions is a warning when the model is loaded."""
    with caplog.at_level(logging.WARNING, "mlx_trainer.models"):
        module_in(tiny_mistral(tmp_path), max_seq_length=513)
    assert caplog.messages == [f"max_seq_length is 513, but {tmp_path} knows 512 positions."]


def test_save_and_load_carry_the_adapters(tmp_path: Path) -> None:
    """A module that loads what a trained one saved has its parameters, bit for bit."""
    directory = tiny_mistral(tmp_path / "base")
    trained, fresh = module_in(directory), module_in(directory)
    train(trained, 2)
    trained.save(tmp_path / "adapter")
    fresh.load(tmp_path / "adapter")
    assert changed(arrays(trained), fresh) == set()


class Hooked(CausalLMModule):
    """Overrides one hook after the other: a model from elsewhere, and logits of another temperature."""

    source: Path

    def load_model(self) -> nn.Module:
        return load_model(self.source, dtype="float32")

    def forward(self, batch: Any) -> mx.array:
        return super().forward(batch) / 2


def test_each_hook_can_be_overridden_alone(tmp_path: Path) -> None:
    """An own `load_model` needs no folder of the module's name, and an own `forward` reaches the loss."""
    hooked = Hooked("nobody/nothing", lora=evolve(LORA, dropout=0.0))
    hooked.source = tiny_mistral(tmp_path)
    hooked.setup("fit")
    plain, batch = module_in(tmp_path, lora=evolve(LORA, dropout=0.0)), labelled()
    assert mx.array_equal(hooked.forward(batch), plain.forward(batch) / 2).item()
    assert hooked.training_loss(batch).total.item() != plain.training_loss(batch).total.item()


def test_types_that_cannot_train_are_refused_at_once() -> None:
    """An unknown dtype, and full fine-tuning in float16, are errors of the constructor that say what to use."""
    with pytest.raises(ModelError, match="dtype 'int8' is unknown; it is one of float16, bfloat16, float32"):
        CausalLMModule("x", dtype="int8")
    with pytest.raises(ModelError, match='in float16 loses its updates; use dtype="float32" or "bfloat16"'):
        CausalLMModule("x", lora=None)
