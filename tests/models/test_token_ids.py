"""Token ids that a model does not have: refused before a kernel, which would end the process, with the row's name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import numpy as np
import pytest

from mlx_trainer import DataPipeline, MistralLoRAModule, Trainer
from mlx_trainer.models import ModelError
from mlx_trainer.models.hf_config import vocabulary_size
from mlx_trainer.models.token_ids import check_ids
from tests.tiny import VOCABULARY, tiny_mistral

CRASH = "import mlx.core as mx; mx.eval(mx.take(mx.ones((384, 64)), mx.array([2**31 - 1]), axis=0))"


@pytest.fixture
def module(tmp_path: Path) -> MistralLoRAModule:
    """Return a tiny model."""
    return MistralLoRAModule(tiny_mistral(tmp_path / "base"), dtype="float32", max_seq_length=64)


def pipeline(tmp_path: Path, tokenizer: Any, **settings: Any) -> DataPipeline:
    """Return eight rows; the sixth ends with its own number."""
    rows = [
        {"messages": [{"role": "user", "content": "dog " * n}, {"role": "assistant", "content": f"the sum is {n}"}]}
        for n in range(1, 9)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataPipeline(path, tokenizer, train_split=0.75, cache_dir=tmp_path / "cache", **settings)


def test_without_the_check_the_process_dies() -> None:
    """What this file is for: MLX on a CPU reads far beyond its memory (where it does not, nothing is protected)."""
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("only a CPU's kernel ends the process")
    assert subprocess.run([sys.executable, "-c", CRASH], capture_output=True, check=False).returncode < 0


@pytest.mark.parametrize("layout", ["padded", "unpadded"])
@pytest.mark.parametrize("field", ["input_ids", "labels or targets"])
@pytest.mark.parametrize("id", [VOCABULARY, 2**31 - 1, -1])
def test_the_row_of_an_id_is_named(tmp_path: Path, module: MistralLoRAModule, layout: Any, field: str, id: int) -> None:
    """In either layout, whether it is read or predicted, in whatever row of the batch it stands."""
    loader = pipeline(tmp_path, module.tokenizer, layout=layout, batch_size=3).train_loader()
    name = field if field == "input_ids" else "labels" if layout == "padded" else "targets"
    seen = set()
    for batch in loader:
        check_ids(batch, VOCABULARY)
        for number, row in enumerate(batch.metadata.rows):
            poisoned = getattr(batch, name).copy()
            if layout == "padded":
                poisoned[number, np.flatnonzero(batch.labels[number] >= 0)[-1]] = id
            elif name == "input_ids":
                poisoned[batch.grid[number, 0]] = id
            else:
                mine = np.isin(batch.predicting, batch.grid[number]) & (batch.targets >= 0)
                poisoned[np.flatnonzero(mine)[0]] = id
            with pytest.raises(ModelError, match=rf"^{row}: {name} has the token id {id}, the model's vocabulary goes"):
                check_ids(attrs.evolve(batch, **{name: poisoned}), VOCABULARY)
            seen.add(row)
    assert len(seen) == 6


def test_a_shared_prefix_names_a_row_of_its_group() -> None:
    """The prefix of an unpadded batch is that of the rows behind it: the second group's first row is the third."""

    @attrs.frozen(eq=False)
    class Grouped:
        input_ids: Any
        grid: Any
        cells: Any
        metadata: Any
        prefix: int = 2
        groups: int = 2

    rows = attrs.make_class("Rows", ["rows"])(("a:1", "a:2", "a:3", "a:4"))
    batch = Grouped(np.array([1, 1, 1, 99, 5, 6, 7, 8]), np.zeros((4, 1)), np.array([0, 1, 2, 3]), rows)
    with pytest.raises(ModelError, match=r"^a:3: input_ids has the token id 99"):
        check_ids(batch, 10)


def test_a_users_own_batches_are_refused_before_anything_runs(tmp_path: Path, module: MistralLoRAModule) -> None:
    """In training, evaluation, prediction and generation; the step count stays 0 and the process lives."""
    good = list(pipeline(tmp_path, module.tokenizer, layout="padded").train_loader())
    bad = attrs.evolve(good[0], input_ids=np.full_like(good[0].input_ids, 2**30))
    trainer = Trainer(max_steps=2)
    for attempt in (
        lambda: trainer.fit(module, [bad, *good]),
        lambda: trainer.validate(module, [*good, bad]),
        lambda: trainer.predict(module, [bad]),
    ):
        with pytest.raises(ModelError, match=r"input_ids has the token id 1073741824"):
            attempt()
    module.tokenizer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=rf"A prompt has the token id {VOCABULARY}; the model's vocabulary ends at"):
        module.generate(["a <new> one"])
    assert trainer.state.step == 0


def test_a_tokenizer_that_was_enlarged_is_told_with_the_row(tmp_path: Path, module: MistralLoRAModule) -> None:
    """A pipeline that knows no model gives ids that the model has not; the first step names the row."""
    module.tokenizer.add_tokens(["sum"])
    data = pipeline(tmp_path, module.tokenizer, batch_size=6, shuffle=False)
    with pytest.raises(ModelError, match=rf"^rows\.jsonl:\d: .* has the token id {VOCABULARY}"):
        Trainer(max_steps=1).fit(module, data)


def enlarge(directory: Path, change: Any) -> None:
    """Change tokenizer.json."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    change(tokenizer)
    path.write_text(json.dumps(tokenizer))


def added(content: str, *, special: bool) -> Any:
    """Return a change that adds a token whose id the model does not have."""
    token = {"id": VOCABULARY, "content": content, "special": special, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    return lambda tokenizer: tokenizer["added_tokens"].append(token)


def test_a_tokenizer_of_another_model_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """Ordinary tokens beyond the vocabulary, or a padding token that every batch would have."""
    directory = tiny_mistral(tmp_path / "larger")
    enlarge(directory, lambda tokenizer: tokenizer["model"]["vocab"].update({"zebra": VOCABULARY + 7}))
    with pytest.raises(ModelError, match=r"ids up to 391, the model's vocabulary ends at 383\. Tokenizer and model do"):
        _ = MistralLoRAModule(directory).tokenizer
    directory = tiny_mistral(tmp_path / "padded")
    enlarge(directory, added("<pad>", special=True))
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"pad_token '<pad>' has id 384, the model's vocabulary ends at 383"):
        _ = MistralLoRAModule(directory).tokenizer


def test_further_added_tokens_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Published text models have such tokens of their family, so they are no error until a row spells one."""
    directory = tiny_mistral(tmp_path)
    enlarge(directory, added("<image>", special=False))
    assert len(MistralLoRAModule(directory).tokenizer) == VOCABULARY + 1
    assert [message.split(". ")[0] for message in caplog.messages] == [
        "The model's vocabulary ends at 383, but the tokenizer has added tokens beyond it, 1 in all: <image> (384)"
    ]


@pytest.mark.parametrize(
    ("settings", "size"),
    [({"vocab_size": 7}, 7), ({"text_config": {"vocab_size": 8}}, 8), ({}, None), ({"vocab_size": "7"}, None)],
)
def test_where_the_vocabulary_is_told(settings: dict[str, Any], size: int | None) -> None:
    """At the top of config.json, or in the text part of a model with several; else it is not checked."""
    assert vocabulary_size(settings) == size
