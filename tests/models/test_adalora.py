"""AdaLoRA in a module: what it computes and adds to the loss, a whole run, and the ordinary adapter that is left."""

import doctest
import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attrs import evolve
from mlx.utils import tree_flatten

from mlx_trainer import DataPipeline, ModelCheckpoint, Trainer, trained
from mlx_trainer.config import AdaLoRAConfig, LoRAConfig, ModelConfig
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.models import AdaLoRAModule, CausalLMModule, ModelError, adalora
from mlx_trainer.models.lora import adapted_layers, trainable
from mlx_trainer.step import TrainStep
from mlx_trainer.traced import from_tree, to_tree
from tests.models.test_unpadded import LINEARS, ROWS, compare, loss_and_gradients, rows_of
from tests.tiny import tiny_mistral

IDS = mx.array([[1, 17, 300, 45, 9], [1, 5, 6, 350, 2]])
LORA = LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS)
RULES = AdaLoRAConfig(target_r=2)
TIGHT = Shape(4, 12, 40)


def module_in(folder: Path, *, seed: int | None = 3, rules: AdaLoRAConfig = RULES, **options: Any) -> AdaLoRAModule:
    """A tiny module in training mode, its Λ as large as its other factors, or 0 where `seed` is None."""
    if not folder.exists():
        tiny_mistral(folder)
    module = AdaLoRAModule(folder, adalora=rules, **{"dtype": "float32", "lora": LORA, **options})
    module.setup("fit")
    for number, layer in enumerate(adapted_layers(module.model).values() if seed is not None else ()):
        layer.lora_e = mx.random.normal(layer.lora_e.shape, key=mx.random.key(seed + number))
    return module


def test_it_starts_at_the_base_models_output(tmp_path: Path) -> None:
    """Λ is 0, P and Q are not, and only these three train."""
    module = module_in(tmp_path / "base", seed=None)
    base = trained.trained_module(ModelConfig(str(tmp_path / "base"), dtype="float32"), None)
    assert mx.array_equal(module.model.eval()(IDS), base.model(IDS)).item()
    names = {name.rpartition(".")[2] for name in trainable(module.model)}
    assert names == {"lora_a", "lora_b", "lora_e"}
    layer = next(iter(adapted_layers(module.model).values()))
    assert mx.std(layer.lora_a).item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("shape", [TIGHT, Shape(5, 14, 60)])
def test_the_unpadded_path_computes_the_same(tmp_path: Path, shape: Shape) -> None:
    """Loss, penalty included, and gradients of all three factors are those of the padded rows."""
    module = module_in(tmp_path / "base")
    assert module.batch_layout == "unpadded"
    compare(module, ROWS, shape, quick=False)


def test_the_penalty_is_added_once_for_each_weight(tmp_path: Path) -> None:
    """Written out: the loss of two micro-batches is their mean loss plus 0.5 times the mean distance from I."""
    module, plain = module_in(tmp_path / "base"), module_in(tmp_path / "base", rules=evolve(RULES, orth_reg_weight=0.0))
    layers = adapted_layers(module.model).values()
    distances = []
    for layer in layers:
        for m in (np.array(layer.lora_a), np.array(layer.lora_b).T):
            distances.append(np.linalg.norm(m.T @ m - np.eye(4)))
    batches = [collate(ROWS, Shape(4, 12, 48)), collate(rows_of([5, 9], [[True] * 4, [True] * 8], 2), Shape(2, 9, 18))]
    losses = [[each.training_loss(from_tree(to_tree(batch))) for batch in batches] for each in (module, plain)]
    totals = [sum(one.total.item() for one in pair) / sum(one.weight.item() for one in pair) for pair in losses]
    assert totals[0] == pytest.approx(totals[1] + 0.5 * np.mean(distances), rel=1e-5)
    step = TrainStep(module, module.configure_optimizer(9), accumulate=2)
    step.optimizer.init(module.model.trainable_parameters())
    output = step(batches)
    assert (output.total / output.weight).item() == pytest.approx(totals[0], rel=1e-5)
    assert (output.metrics["orthogonality"] / output.weight).item() == pytest.approx(np.mean(distances), rel=1e-5)


def test_evaluation_is_of_the_loss_alone(tmp_path: Path) -> None:
    """In eval mode nothing is added."""
    module = module_in(tmp_path / "base")
    module.model.eval()
    output = module.validation_loss(from_tree(to_tree(collate(ROWS, Shape(4, 12, 48)))))
    folded = CausalLMModule.training_loss(module, from_tree(to_tree(collate(ROWS, Shape(4, 12, 48)))))
    assert output.total.item() == folded.total.item()
    assert output.metrics.keys() == {"token_accuracy"}


def test_the_gradient_is_that_of_the_three_factors(tmp_path: Path) -> None:
    """Against central differences of the loss, for the entry of each factor that it depends on most."""
    module = module_in(tmp_path / "base")
    batch = collate_unpadded(ROWS, TIGHT, 30)
    _, _, gradients = loss_and_gradients(module, batch)
    layer = module.model.model.layers[1].mlp.up_proj
    for name in ("lora_a", "lora_e", "lora_b"):
        gradient = np.array(gradients[f"model.layers.1.mlp.up_proj.{name}"])
        values, at, ends = layer[name], np.unravel_index(np.abs(gradient).argmax(), gradient.shape), []
        for shift in (1e-2, -1e-2):
            moved = np.array(values)
            moved[at] += shift
            layer[name] = mx.array(moved)
            ends.append(loss_and_gradients(module, batch)[0])
        layer[name] = values
        expected = (ends[0] - ends[1]) / 2e-2
        assert gradient[at] == pytest.approx(expected, rel=0.02)


def run(folder: Path) -> tuple[AdaLoRAModule, Any]:
    """Train 8 steps on uneven rows, two of them after the last allocation."""
    tiny_mistral(folder / "base")
    rows = [{"prompt": "dog " * n, "completion": f"the sum is {n}"} for n in range(1, 9)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rules = AdaLoRAConfig(target_r=2, tinit=1, tfinal=2, deltaT=2)
    lora = LoRAConfig(rank=4, dropout=0.1)
    module = AdaLoRAModule(
        folder / "base",
        adalora=rules,
        lora=lora,
        dtype="float32",
        learning_rate=0.01,
        warmup_steps=0,
        max_seq_length=64,
    )
    trainer = Trainer(max_steps=8, max_epochs=4, log_every=1, run_dir=folder / "run", callbacks=[ModelCheckpoint()])
    return module, trainer.fit(module, DataPipeline(folder / "chats.jsonl", module.tokenizer, train_split=1.0))


def test_a_run_ends_with_its_budget_and_an_adapter_that_mlx_lm_opens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of 4 layers with rank 4 there are 8 ranks left, told; mlx-lm and `generate` compute the same logits."""
    from mlx_lm.utils import load

    with caplog.at_level(logging.INFO, "mlx_trainer.models"):
        module, result = run(tmp_path)
    layers = adapted_layers(module.model)
    left = [int((layer.lora_e != 0).sum().item()) for layer in layers.values()]
    assert (sum(left), len(left), result.metrics["train/rank"]) == (8, 4, 2.0)
    told = ", ".join(f"{left.count(rank)} of rank {rank}" for rank in sorted(set(left)))
    assert caplog.messages[-1] == f"AdaLoRA adapters: {told}"
    expected = np.array(module.model.eval()(IDS))
    theirs, _ = load(str(tmp_path / "base"), adapter_path=str(tmp_path / "run" / "adapter"))
    base = ModelConfig(str(tmp_path / "base"), dtype="float32")
    ours, plain = (trained.trained_module(base, adapter) for adapter in (str(tmp_path / "run" / "adapter"), None))
    assert np.abs(np.array(theirs(IDS)) - expected).max() <= 1e-5
    assert np.abs(np.array(ours.model(IDS)) - expected).max() <= 1e-5
    assert np.abs(np.array(plain.model(IDS)) - expected).max() > 1e-3


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    """More than there is at the start, other kinds of layers, and a folder without the factors."""
    tiny_mistral(tmp_path / "base")
    with pytest.raises(ModelError, match=r"adalora\.target_r is 5; it must be 1 to lora\.rank"):
        module_in(tmp_path / "base", rules=AdaLoRAConfig(target_r=5))
    with pytest.raises(ModelError, match="AdaLoRA is for linear layers without DoRA"):
        module_in(tmp_path / "base", lora=evolve(LORA, use_dora=True))
    module = module_in(tmp_path / "base")
    before = dict(tree_flatten(module.model.parameters()))
    with pytest.raises(ModelError, match="has no adapters that AdaLoRA goes on from"):
        module.load(tmp_path)
    assert all(value is before[name] for name, value in tree_flatten(module.model.parameters()))


def test_the_examples_in_docstrings_run() -> None:
    """They give what they show."""
    assert doctest.testmod(adalora).failed == 0
