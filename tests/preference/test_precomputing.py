"""A reference that is computed once, before training: the same numbers, kept for a second start."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_trainer import DataPipeline, Trainer
from mlx_trainer.config import LoRAConfig
from mlx_trainer.data.batches.pairs import ReferredBatch, ReferredUnpaddedBatch
from mlx_trainer.models import ModelError
from mlx_trainer.preference import DPOModule, precompute_reference, precomputing
from mlx_trainer.preference.answers import adapters_off
from tests.tiny import tiny_mistral


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_mistral(tmp_path_factory.mktemp("model"), hidden_size=32)
    rows = [
        {"prompt": "dog " * (i % 9) + str(i), "chosen": "fox " * (i % 3 + 1), "rejected": "sea " * (i % 5 + 1)}
        for i in range(24)
    ]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def module_of(folder: Path, **options: Any) -> DPOModule:
    options = {"lora": LoRAConfig(rank=4, dropout=0.0), "learning_rate": 1e-2, "schedule": "constant", **options}
    return DPOModule(folder, dtype="float32", warmup_steps=0, max_seq_length=128, **options)


def data_of(folder: Path, module: DPOModule, cache: Path, **options: Any) -> DataPipeline:
    options = {"batch_size": 4, "pairs": True, "train_split": 0.75, "max_seq_length": 128, **options}
    return DataPipeline(folder / "prefs.jsonl", module.tokenizer, cache_dir=cache, **options)


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
def test_the_run_is_the_same_without_a_forward_of_the_base(folder: Path, tmp_path: Path, layout: str) -> None:
    """Losses and held-out rewards are those of a reference in each step; the base is not run in any."""
    told = {}
    for name in ("in each step", "before"):
        module = module_of(folder)
        data = data_of(folder, module, tmp_path, layout=layout)
        if name == "before":
            precompute_reference(module, data)
        with patch("mlx_trainer.preference.module.adapters_off", wraps=adapters_off) as off:
            fitted = Trainer(max_steps=6, accumulate=2, log_every=1).fit(module, data)
            held_out = Trainer().validate(module, data.validation_loader())
        told[name] = {**fitted.metrics, **held_out.metrics}, off.call_count
    (expected, calls), (found, none) = told["in each step"], told["before"]
    assert calls > none == 0
    assert abs(expected["rewards/margins"]) > 0.01
    for key in ("train/loss", "train/rewards/margins", "rewards/chosen", "rewards/margins"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5)


def test_a_second_start_reads_it(folder: Path, tmp_path: Path) -> None:
    """Kept for base, type and rows: another of these is computed anew, and so is a file that is damaged."""
    module = module_of(folder)
    data = data_of(folder, module, tmp_path)
    precompute_reference(module, data)
    first = data.references
    with patch.object(precomputing, "computed", side_effect=AssertionError("computed again")):
        precompute_reference(module, data)
        assert [a.tolist() for a in data.references] == [b.tolist() for b in first]  # type: ignore[union-attr]
        with pytest.raises(AssertionError, match="computed again"):
            precompute_reference(module, data_of(folder, module, tmp_path, train_split=0.5))
        other = DPOModule(folder, dtype="bfloat16", max_seq_length=128)
        with pytest.raises(AssertionError, match="computed again"):
            precompute_reference(other, data)
    files = sorted((tmp_path / "references").iterdir())
    assert [file.suffix for file in files] == [".npy"] * 2
    for damage in (b"", b"\x93NUMPY", np.full(3, np.nan, np.float32).tobytes()):
        for file in files:
            file.write_bytes(damage)
        precompute_reference(module, data)
        assert [a.tolist() for a in data.references] == [b.tolist() for b in first]  # type: ignore[union-attr]


def test_all_weights_train_with_it(folder: Path, tmp_path: Path) -> None:
    """Full fine-tuning compares with the model as it was: rewards begin at zero, and the margin rises."""
    module = module_of(folder, lora=None, learning_rate=1e-4)
    data = data_of(folder, module, tmp_path, train_split=1.0, batch_size=8)
    precompute_reference(module, data)
    before = Trainer().validate(module, data.train_loader()).metrics
    Trainer(max_steps=8).fit(module, data)
    after = Trainer().validate(module, data.train_loader()).metrics
    assert abs(before["rewards/margins"]) < 1e-5
    assert after["rewards/margins"] > 0.1
    assert after["rewards/accuracies"] == 1.0
    assert len(dict(tree_flatten(module.model.trainable_parameters()))) > 20


def test_each_answer_has_its_own(folder: Path, tmp_path: Path) -> None:
    """Whatever the epoch's order, weights and layout, a batch holds the values of its own rows, and zeros for none."""
    module = module_of(folder)
    for layout, kind in (("padded", ReferredBatch), ("unpadded", ReferredUnpaddedBatch)):
        data = DataPipeline(
            {folder / "prefs.jsonl": 0.5}, module.tokenizer, pairs=True, train_split=1.0, batch_size=5, layout=layout
        )
        numbers = {row.source: number for number, row in enumerate(data.train_rows)}
        data.references = np.arange(len(numbers), dtype=np.float32), None
        loader = data.train_loader()
        for batch in (*loader, *loader):
            assert isinstance(batch, kind)
            rows = [numbers[source] for source in batch.metadata.rows]
            assert batch.reference.tolist() == [*rows, *[0] * (len(batch.reference) - len(rows))]
    assert "reference" in loader.fingerprint()


def test_it_is_of_pairs(folder: Path) -> None:
    """Rows that are none have no reference."""
    module = module_of(folder)
    (folder / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    with pytest.raises(ModelError, match="make the data with pairs=True"):
        precompute_reference(module, DataPipeline(folder / "chats.jsonl", module.tokenizer, train_split=1.0))
