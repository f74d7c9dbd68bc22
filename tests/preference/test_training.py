"""Preference training on the Trainer as it stands: rewards, evaluation, checkpoints, exact resume."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import DataPipeline, Trainer
from mlx_trainer.callbacks import (
    EarlyStopping,
    Evaluation,
    GradientClipping,
    Ledger,
    MetricsLogger,
    ModelCheckpoint,
    NaNGuard,
)
from mlx_trainer.config import LoRAConfig
from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.monitoring import MetricsTracker
from mlx_trainer.preference import DPOModule, ORPOModule, PreferenceModule
from mlx_trainer.traced import from_tree, to_tree
from tests.tiny import tiny_mistral

KINDS: dict[str, type[PreferenceModule]] = {"dpo": DPOModule, "orpo": ORPOModule}
WORDS = ["the", "cat", "and", "a", "dog", "see", "house", "river", "north", "sea", "fox", "model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and preferences for short, cheerful answers."""
    folder = tiny_mistral(tmp_path_factory.mktemp("model"), hidden_size=32)
    draw = random.Random(0)
    rows = [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(2, 30))),
            "chosen": "yes, with joy: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 3))),
            "rejected": "no. never. " + " ".join(draw.choices(WORDS, k=draw.randint(1, 9))),
        }
        for _ in range(40)
    ]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def data_of(folder: Path, module: CausalLMModule, **options: Any) -> DataPipeline:
    options = {"batch_size": 4, "max_seq_length": 256, "train_split": 0.8, "pairs": True, **options}
    return DataPipeline(folder / "prefs.jsonl", module.tokenizer, **options)


def module_of(folder: Path, kind: str, dropout: float = 0.1) -> PreferenceModule:
    lora = LoRAConfig(rank=8, alpha=16, dropout=dropout)
    return KINDS[kind](
        folder, dtype="float32", max_seq_length=256, lora=lora, learning_rate=1e-2, warmup_steps=2, schedule="constant"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_preferred_is_learnt(folder: Path, tmp_path: Path, kind: str) -> None:
    """In 20 steps every held-out pair is told right, with a margin that rises from nothing; callbacks see it all."""
    module = module_of(folder, kind)
    data = data_of(folder, module)
    callbacks = [
        NaNGuard(),
        MetricsLogger(),
        GradientClipping(max_norm=1.0),
        Evaluation(every=5),
        EarlyStopping(monitor="val/loss", patience=9),
        Ledger(),
    ]
    trainer = Trainer(max_steps=20, accumulate=2, callbacks=callbacks, log_every=1, run_dir=tmp_path)
    trainer.fit(module, data)
    tracker = MetricsTracker.read(tmp_path / "metrics.jsonl")
    margins, losses = (tracker.series(tag)[1] for tag in ("train/rewards/margins", "val/loss"))
    held_out = {name: tracker.series(f"val/{name}")[1][-1] for name in ("rewards/accuracies", "rewards/margins")}
    assert margins[-1] > margins[0] + 0.1
    assert losses[-1] < losses[0]
    assert held_out["rewards/accuracies"] == 1.0
    assert held_out["rewards/margins"] > 0.1
    if kind == "dpo":
        assert abs(margins[0]) < 1e-5  # an adapter that is still zero is the reference
    ledger = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    for rows in (line["rows"] for line in ledger):
        assert [row.rpartition(" ")[2] for row in rows] == ["chosen", "rejected"] * (len(rows) // 2)
        assert [row.rpartition(" ")[0] for row in rows[::2]] == [row.rpartition(" ")[0] for row in rows[1::2]]


def test_resumed_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    """With dropout, stopped after 5 of 9 steps within the second epoch and resumed: bit for bit the same adapters."""

    def trained(run: str, steps: int, **options: Any) -> dict[str, list[Any]]:
        module = module_of(folder, "dpo", dropout=0.3)
        checkpoints = ModelCheckpoint(every=5)
        trainer = Trainer(
            max_steps=steps, max_epochs=9, accumulate=2, callbacks=[checkpoints], run_dir=tmp_path / run, **options
        )
        trainer.fit(module, data_of(folder, module))
        return {name: value.tolist() for name, value in tree_flatten(module.model.trainable_parameters())}

    whole = trained("whole", 9)
    trained("parts", 5)
    assert trained("parts", 9, resume="auto", allow_changes=["max_steps"]) == whole


def test_compiled_it_is_the_same(folder: Path) -> None:
    """The reference is traced in one graph with the policy: the loss and margin of the third step are those of MLX
    without compilation.
    """

    def third(compiled: bool) -> dict[str, float]:
        (mx.enable_compile if compiled else mx.disable_compile)()
        module = module_of(folder, "dpo", dropout=0.0)
        data = data_of(folder, module, batch_size=16, max_shapes=1)
        return dict(Trainer(max_steps=3, log_every=1).fit(module, data).metrics)

    plain, traced = third(False), third(True)
    assert traced["train/rewards/margins"] > 0.01
    for name in ("train/loss", "train/rewards/margins", "train/logps/rejected"):
        assert traced[name] == pytest.approx(plain[name], rel=1e-4)


def test_the_loss_is_part_of_what_a_run_is(folder: Path) -> None:
    """Another beta, loss or method would be another training, which resuming tells."""
    prints = [module_of(folder, kind).fingerprint() for kind in KINDS]
    prints += [DPOModule(folder, beta=0.2).fingerprint(), DPOModule(folder, loss_type="ipo").fingerprint()]
    assert len({json.dumps(each, sort_keys=True, default=str) for each in prints}) == 4
    assert [each["method"] for each in prints[:2]] == ["dpo", "orpo"]


def test_rows_that_are_no_pairs_are_refused(folder: Path) -> None:
    """A module for pairs wants pairs, and one for rows would learn what was rejected."""
    preferring = module_of(folder, "dpo")
    (folder / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    chats = DataPipeline(folder / "chats.jsonl", preferring.tokenizer, train_split=1.0)
    with pytest.raises(ModelError, match="DPOModule needs pairs of answers: make the data with pairs=True"):
        Trainer(max_steps=1).fit(preferring, chats)
    plain = CausalLMModule(folder, dtype="float32")
    with pytest.raises(ModelError, match="CausalLMModule would learn the rejected answers of pairs too"):
        Trainer(max_steps=1).fit(plain, data_of(folder, plain))


def test_layouts_give_the_same_loss(folder: Path) -> None:
    """Padded and unpadded batches of a whole epoch have the same mean loss; prompts are shared in the latter alone."""
    told = {}
    for layout in ("padded", "unpadded"):
        module = module_of(folder, "orpo", dropout=0.0)
        data = data_of(folder, module, layout=layout, batch_size=8)
        told[layout] = Trainer().validate(module, data.train_loader())
    assert told["padded"].loss == pytest.approx(told["unpadded"].loss, rel=1e-5)
    for name, value in told["padded"].metrics.items():
        assert told["unpadded"].metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5)
    counts = {layout: metrics.counts for layout, metrics in told.items()}
    assert counts["padded"]["rows"] == counts["unpadded"]["rows"] == 32
    assert "shared_tokens" not in counts["padded"]
    assert counts["unpadded"]["shared_tokens"] > 0.15 * counts["unpadded"]["tokens"]


class OwnForward(DPOModule):
    """A module with a forward of its own, as those of other architectures are: it gives logits of padded batches."""

    asked = 0

    def forward(self, batch: Any) -> mx.array:
        self.asked += 1
        return super().forward(batch)


def test_any_architecture_has_a_padded_way(folder: Path) -> None:
    """Its batches are padded, its forward gives policy and reference, and the losses are those of the unpadded way."""
    lora, losses = LoRAConfig(rank=4, dropout=0.0), []
    for kind in (OwnForward, DPOModule):
        module = kind(folder, dtype="float32", lora=lora, max_seq_length=256, warmup_steps=0, learning_rate=1e-2)
        data = data_of(folder, module, batch_size=32, max_shapes=1)
        losses.append(Trainer(max_steps=3, log_every=1).fit(module, data).metrics["train/loss"])
        assert module.batch_layout == ("padded" if kind is OwnForward else "unpadded")
        assert not isinstance(module, OwnForward) or module.asked >= 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] < 0.69


def test_dropout_is_off_in_the_reference_alone(folder: Path) -> None:
    """Two steps over one batch draw other masks for the policy; the reference is the same each time."""
    module = module_of(folder, "dpo", dropout=0.5)
    for _, values in tree_flatten(module.model.trainable_parameters()):
        values[:] = mx.random.normal(values.shape, key=mx.random.key(values.size)) * 0.05
    module.setup("fit")
    batch = next(iter(data_of(folder, module, layout="padded").train_loader()))
    traced = from_tree(to_tree(batch))
    policy = [module.score(traced).log_probabilities.tolist() for _ in range(2)]
    reference = [module.reference(traced).tolist() for _ in range(2)]
    assert policy[0] != policy[1]
    assert reference[0] == reference[1]
