"""The unpadded forward equals the padded one: loss and all gradients, on random rows."""

import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_trainer import Trainer, runtime
from mlx_trainer.callbacks import Evaluation
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data import DataPipeline
from mlx_trainer.data.batches.padded import collate
from mlx_trainer.data.batches.shapes import Shape
from mlx_trainer.data.batches.unpadded import collate_unpadded
from mlx_trainer.data.store.store import TokenRow
from mlx_trainer.models import CausalLMModule, head, unpadded
from mlx_trainer.models.unpadded import feed_forward
from mlx_trainer.traced import from_tree, to_tree
from tests.tiny import tiny_mistral

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def module_of(folder: Path, **options: Any) -> CausalLMModule:
    """A tiny module that trains; its adapters are not zero, nor so large that it makes much of a sum's rounding."""
    module = CausalLMModule(folder, dtype="float32", **options)
    for _, values in tree_flatten(module.model.trainable_parameters()):
        values[:] = mx.random.normal(values.shape, key=mx.random.key(values.size)) * 0.05
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> CausalLMModule:
    """A tiny Mistral with adapters on every linear layer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_mistral(folder)
    return module_of(folder, lora=LoRAConfig(rank=4, dropout=0.0, target_modules=LINEARS))


def rows_of(lengths: Sequence[int], trained: Sequence[Sequence[bool]], seed: int) -> list[TokenRow]:
    """Rows of random ids."""
    random = np.random.default_rng(seed)
    return [
        TokenRow(f"x:{i}", random.integers(10, 380, n).astype(np.int32), np.array([False, *flags])[:n])
        for i, (n, flags) in enumerate(zip(lengths, trained, strict=True))
    ]


def loss_and_gradients(module: CausalLMModule, batch: Any) -> tuple[float, float, dict[str, mx.array]]:
    """Loss sum, weight and gradients by name."""
    traced = from_tree(to_tree(batch))

    def loss(_: nn.Module) -> tuple[mx.array, mx.array]:
        output = module.training_loss(traced)
        return output.total, output.weight

    (value, weight), gradients = nn.value_and_grad(module.model, loss)(module.model)
    return value.item(), weight.item(), dict(tree_flatten(gradients))


def assert_same(module: CausalLMModule, rows: list[TokenRow], *, spare_rows: int = 0, spare: int = 0) -> None:
    """Loss to 1e-6 and every gradient to 1e-5, however large the shape is.

    With MLX's own exponentials that is 1e-5 of the parameter's largest gradient, and noise of the size of the others'
    rounding where it is zero, as that of queries with a single key. With powers of two, which are exact to 2e-6, it is
    1e-5 of the largest gradient of all.
    """
    for quick in (False, True):
        with patch.object(runtime, "linux_cpu", lambda quick=quick: quick):
            assert_same_with(module, rows, quick, spare_rows=spare_rows, spare=spare)


def assert_same_with(module: CausalLMModule, rows: list[TokenRow], quick: bool, *, spare_rows: int, spare: int) -> None:
    """The same, with `quick` exponentials or MLX's."""
    length = max(map(len, rows)) + spare
    tokens = min(sum(map(len, rows)) + 1 + spare, (len(rows) + spare_rows) * length)
    compare(module, rows, Shape(len(rows) + spare_rows, length, tokens), quick)


def compare(module: CausalLMModule, rows: list[TokenRow], shape: Shape, quick: bool) -> None:
    """The unpadded batch of this shape against rows that are merely padded."""
    predictions = sum(row.trained_tokens for row in rows) + 1
    length = max(map(len, rows))
    plain = loss_and_gradients(module, collate(rows, Shape(len(rows), length, len(rows) * length)))
    ours = loss_and_gradients(module, collate_unpadded(rows, shape, predictions))
    assert ours[1] == plain[1]
    assert ours[0] == pytest.approx(plain[0], rel=1e-6, abs=1e-6)
    assert ours[2].keys() == plain[2].keys() != set()
    largest = max(mx.abs(expected).max().item() for expected in plain[2].values())
    for name, expected in plain[2].items():
        allowed = 1e-5 * largest if quick else 1e-5 * mx.abs(expected).max().item() + 1e-6 * largest
        assert mx.abs(ours[2][name] - expected).max().item() <= allowed, name


@st.composite
def drawn_rows(draw: st.DrawFn) -> list[TokenRow]:
    """Uneven rows, rows of one token and single rows among them; perhaps all alike, perhaps nothing trained."""
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    if draw(st.booleans()):
        lengths = [lengths[0]] * len(lengths)
    trained = [draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1)) for n in lengths]
    return rows_of(lengths, trained, draw(st.integers(0, 3)))


@given(drawn_rows(), st.integers(0, 2), st.integers(0, 5))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_equals_padded(module: CausalLMModule, rows: list[TokenRow], spare_rows: int, spare: int) -> None:
    """Loss and gradients are those of the padded batch, with and without room to spare."""
    assert_same(module, rows, spare_rows=spare_rows, spare=spare)


ROWS = rows_of([7, 1, 12, 12], [[True] * 6, [], [False] * 4 + [True] * 7, [True, False] * 5 + [True]], 1)


def test_equals_padded_in_parts(module: CausalLMModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head in parts of 16 predictions gives what it gives in one."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 1)
    assert_same(module, ROWS, spare=3)


@pytest.mark.parametrize("kind", ["tied", "4-bit", "trained head", "all weights"])
def test_other_heads_and_bases(tmp_path: Path, kind: str) -> None:
    """A tied head, a packed base, a head with an adapter, and full fine-tuning have the same loss and gradients too."""
    tiny_mistral(tmp_path, tied=kind == "tied", bits=4 if kind == "4-bit" else None)
    targets = [*LINEARS, "lm_head"] if kind == "trained head" else LINEARS
    lora = None if kind == "all weights" else LoRAConfig(rank=4, dropout=0.0, target_modules=targets)
    assert_same(module_of(tmp_path, lora=lora), ROWS, spare_rows=1, spare=2)


FAMILY: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora on the head": {"use_dora": True, "target_modules": [*LINEARS, "lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora and dora": {"init_lora_weights": "olora", "use_dora": True, "use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7.0}, "layers_to_transform": [1]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tied embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", FAMILY)
def test_the_family_of_lora(tmp_path: Path, kind: str, bits: int | None) -> None:
    """Magnitudes, starts that are taken off, ranks by layer, and adapters on embedding and head: the same as padded."""
    tiny_mistral(tmp_path, tied="tied" in kind, bits=bits)
    lora = LoRAConfig(**{"rank": 4, "dropout": 0.0, "target_modules": LINEARS} | FAMILY[kind])
    assert_same(module_of(tmp_path, lora=lora), ROWS, spare_rows=1, spare=2)


class OwnForward(CausalLMModule):
    """A forward that knows nothing of unpadded batches."""

    def forward(self, batch: Any) -> mx.array:
        return super().forward(batch) * 2


@pytest.mark.parametrize(
    ("kind", "changes", "layout"),
    [
        (CausalLMModule, {}, "unpadded"),
        (OwnForward, {}, "padded"),
        (CausalLMModule, {"layer_types": ["full_attention", "sliding_attention"]}, "padded"),
        (CausalLMModule, {"model_type": "gemma3"}, "padded"),
    ],
)
def test_the_layout_is_one_that_the_module_can_take(
    tmp_path: Path, kind: type[CausalLMModule], changes: dict[str, Any], layout: str
) -> None:
    """Unpadded for a Llama with full attention, unless a subclass brings a forward of its own; padded for others."""
    tiny_mistral(tmp_path)
    module = kind(tmp_path)
    module.settings.update(changes)
    assert module.batch_layout == layout


@pytest.mark.parametrize("own_metric", [False, True])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_a_run_takes_the_layout_that_its_module_asks_for(tmp_path: Path, layout: Any, own_metric: bool) -> None:
    """Training is unpadded unless the user says otherwise; held-out batches are padded for metrics of one's own."""
    tiny_mistral(tmp_path)
    lines = [json.dumps({"prompt": "dog " * (1 + i % 7), "completion": f"the sum is {i}"}) for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    module = CausalLMModule(tmp_path, dtype="float32", lora=LoRAConfig(dropout=0.0))
    data = DataPipeline(tmp_path / "chats.jsonl", module.tokenizer, layout=layout)
    trainer = Trainer(max_steps=2, callbacks=[Evaluation(metrics={"positions": positions} if own_metric else None)])
    result = trainer.fit(module, data)
    assert math.isfinite(result.metrics["train/loss"])
    assert result.evaluation is not None
    assert data.train_loader().layout == ("unpadded" if layout == "auto" else "padded")
    held_out = data.validation_loader()
    assert held_out is not None
    assert held_out.layout == ("unpadded" if layout == "auto" and not own_metric else "padded")


def positions(module: Any, batch: Any) -> tuple[mx.array, mx.array]:
    """A metric of one's own, which reads a padded batch."""
    return batch.attention_mask.sum(), mx.array(batch.attention_mask.size)


def test_eval_mode_counts_right_guesses(module: CausalLMModule) -> None:
    """Held-out loss and token accuracy are those of the padded batch."""
    shape = Shape(5, 14, 40)
    module.model.eval()
    try:
        plain, ours = (
            module.validation_loss(from_tree(to_tree(batch)))
            for batch in (collate(ROWS, shape), collate_unpadded(ROWS, shape, 30))
        )
    finally:
        module.model.train()
    assert ours.total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    assert ours.weight.item() == plain.weight.item()
    assert ours.metrics["token_accuracy"].item() == plain.metrics["token_accuracy"].item()


def test_the_last_mlp_sees_what_predicts_alone(module: CausalLMModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """All other layers' see all positions."""
    seen: list[int] = []

    def counted(mlp: Any, norm: Any, h: mx.array, *options: Any) -> mx.array:
        seen.append(len(h))
        return feed_forward(mlp, norm, h, *options)

    monkeypatch.setattr(unpadded, "feed_forward", counted)
    batch = collate_unpadded(ROWS, Shape(4, 12, 40), predictions=24)
    states = unpadded.hidden_states(module.model, from_tree(to_tree(batch)))
    assert seen == [40] * (len(module.model.model.layers) - 1) + [24]
    assert len(states) == 24


@pytest.mark.parametrize("cpu", [True, False])
def test_the_gradient_of_swiglu(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    """That of the formula, as Linux CPUs compute it and as others do, in two kernels without a sigmoid apart."""
    monkeypatch.setattr(runtime, "linux_cpu", lambda: cpu)
    gate, up, cotangent = (mx.random.normal((9, 16), key=mx.random.key(i)) * 4 for i in range(3))
    mx.eval(gate, up, cotangent)
    mx.enable_compile()
    found = mx.compile(lambda *given: mx.vjp(unpadded.swiglu, list(given[:2]), [given[2]])[1])(gate, up, cotangent)
    buffer = io.StringIO()
    mx.export_to_dot(buffer, *found)
    kernels = re.findall(r'label ="(\w*(?:Compiled|Sigmoid)\w*)", shape=rectangle', buffer.getvalue())
    expected = mx.vjp(lambda gate, up: gate * mx.sigmoid(gate) * up, [gate, up], [cotangent])[1]
    for mine, plain in zip(found, expected, strict=True):
        assert mx.allclose(mine, plain, rtol=1e-5, atol=2e-6).item()
    assert cpu or (len(kernels) == 2 and all(name.startswith("Compiled") for name in kernels))
