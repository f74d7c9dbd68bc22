"""What a resumed run may not change unasked, what it may, and that a finished one has nothing left to do."""

import doctest
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import pytest

from mlx_trainer import (
    Callback,
    GradientClipping,
    LambdaCallback,
    ModelCheckpoint,
    NaNGuard,
    Trainer,
    build,
    resuming,
)
from mlx_trainer.callback import Gradients
from mlx_trainer.checkpoint import CheckpointError, CheckpointStore
from mlx_trainer.cli import main
from mlx_trainer.config import load_config
from mlx_trainer.result import TrainingResult
from mlx_trainer.step import StepContext
from tests.tiny import tiny_mistral
from tests.toy import ToyLoader, ToyModule, toy_batches, weights

QUICK = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 64,
    "lora.rank": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 4,
    "training.warmup_steps": 1,
    "training.learning_rate": 1e-2,
    "training.save_steps": 2,
    "data.dataset_path": "chats.jsonl",
    "data.train_split": 0.75,
    "run.directory": "run",
}


def write_rows(*numbers: int) -> None:
    """Write `chats.jsonl`, a chat for each number."""
    rows = [
        {"messages": [{"role": "user", "content": "dog " * n}, {"role": "assistant", "content": f"the sum is {n}"}]}
        for n in numbers
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with a tiny model, `base`, and eight chats of uneven length, `chats.jsonl`."""
    monkeypatch.chdir(tmp_path)
    tiny_mistral(tmp_path / "base")
    write_rows(*range(1, 9))
    return tmp_path


def train(resume: str | None = "auto", **overrides: object) -> TrainingResult:
    """Train as QUICK says, but for `overrides` such as lora__rank=4."""
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    return build.train(load_config(overrides=QUICK | {"run.resume": resume} | named))


def tensors(path: Path) -> dict[str, bytes]:
    """Name and bytes of each tensor of a file, which holds them in any order."""
    loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return {name: bytes(memoryview(value)) for name, value in loaded.items()}


def contents(folder: Path, *but: str) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file under `folder`, but for the names in `but`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not set(path.parts) & set(but)]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


OPTIONS: Mapping[str, tuple[object, str]] = {
    "model.dtype": ("bfloat16", "dtype: float32 → bfloat16"),
    "model.max_seq_length": (48, "max_seq_length: 64 → 48"),
    "lora.rank": (4, "lora_rank: 2 → 4"),
    "lora.alpha": (8.0, "lora_alpha: 32.0 → 8.0"),
    "lora.dropout": (0.0, "lora_dropout: 0.05 → 0.0"),
    "lora.target_modules": (["k_proj"], 'lora_target_modules: ["q_proj", "v_proj"] → ["k_proj"]'),
    "training.method": ("full", "method: lora → full"),
    "training.batch_size": (1, "batch_size: 2 → 1"),
    "training.batch_tokens": (64, "batch_tokens: none → 64"),
    "training.gradient_accumulation_steps": (2, "accumulate: 1 → 2"),
    "training.optimizer": ("lion", "optimizer: AdamW → Lion"),
    "training.schedule": ("linear", "schedule: cosine → linear"),
    "training.learning_rate": (2e-2, "learning_rate: 0.01 → 0.02"),
    "training.warmup_steps": (2, "warmup_steps: 1 → 2"),
    "training.weight_decay": (0.5, "weight_decay: 0.01 → 0.5"),
    "training.loraplus_lr_ratio": (16.0, "loraplus_lr_ratio: none → 16.0"),
    "training.neftune_noise_alpha": (5.0, "neftune_noise_alpha: none → 5.0"),
    "training.ema_decay": (0.9, "ema: none → [0.9, true]"),
    "training.trainable_layers": (1, "trainable_layers: none → 1"),
    "adalora.target_r": (1, "adalora_target_r: none → 1"),
    "training.max_grad_norm": (0.5, "max_grad_norm: 1.0 → 0.5"),
    "data.completion_style": ("raw", "completion_style: chat → raw"),
    "data.truncation": ("drop", "truncation: truncate → drop"),
    "data.layout": ("padded", "layout: unpadded → padded"),
    "data.shuffle": (False, "shuffle: true → false"),
    "data.train_split": (0.5, "dataset/chats.jsonl: 6 rows "),
    "data.seed": (7, "seed: 42 → 7"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose newest checkpoint is of step 2, with its base model and data, made once."""
    place = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        tiny_mistral(place / "base")
        write_rows(*range(1, 9))
        train(None, training__max_steps=2)
    return place


@pytest.mark.parametrize("key", OPTIONS)
def test_a_changed_option_is_refused_by_name(key: str, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would change the trained numbers: told as `name: was → is` with the way to allow it; no file is touched."""
    monkeypatch.chdir(begun)
    value, told = OPTIONS[key]
    before = contents(begun / "run", "logs", "tensorboard")
    with pytest.raises(CheckpointError) as caught:
        train(**{key: value})
    assert told in str(caught.value)
    name = told.partition(":")[0].partition("/")[0]
    assert re.search(rf"--run\.allow_changes (\w+,)*{name}(,|$)", str(caught.value))
    assert contents(begun / "run", "logs", "tensorboard") == before


EDITS: Mapping[str, tuple[int, ...]] = {
    "changed": (1, 2, 3, 4, 5, 6, 9, 9),
    "added": (1, 2, 3, 4, 5, 6, 7, 8, 9),
    "removed": (1, 2, 3, 4, 5, 6, 7),
    "reordered": (8, 7, 6, 5, 4, 3, 2, 1),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_dataset_is_refused(edit: str, workplace: Path) -> None:
    """A row that is another, one more, one less, or the same in another order; the same file written again is not."""
    train(None, training__max_steps=2)
    write_rows(*EDITS[edit])
    with pytest.raises(CheckpointError, match=r"dataset/chats\.jsonl: 6 rows [0-9a-f]{16} → \d rows [0-9a-f]{16}"):
        train()
    write_rows(*range(1, 9))
    assert train().steps == 4


def test_another_base_model_of_the_same_name_is_refused(workplace: Path) -> None:
    """The folder's weights were replaced; every shape is the same, and the checkpoint does not hold them."""
    train(None, training__max_steps=2)
    tiny_mistral(workplace / "base", seed=1)
    with pytest.raises(CheckpointError, match=r"frozen_parameters: [0-9a-f]{16} → [0-9a-f]{16}"):
        train()


def test_another_tokenizer_is_refused(workplace: Path) -> None:
    """A chat template with one blank more makes other tokens, and is told as the tokenizer's and the dataset's."""
    train(None, training__max_steps=2)
    path = workplace / "base" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("[INST] ", "[INST]  "))
    with pytest.raises(CheckpointError, match=r"tokenizer: [0-9a-f]{16} → [0-9a-f]{16}"):
        train()


def test_the_command_line_tells_it_and_takes_the_permission(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one paragraph; what it proposes works."""
    train(None, training__max_steps=2)
    Path("recipe.json").write_text(json.dumps(as_tree(QUICK)))
    command = ["train", "recipe.json", "--resume", "auto", "--training.learning_rate", "0.02", "--ledger"]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("mlx-trainer: cannot resume from run/checkpoints/step-00000002, because the numbers would")
    permission = re.search(r"--run\.allow_changes \S+$", said)
    assert permission is not None
    assert main([*command, *permission.group().split()]) == 0
    assert [json.loads(line)["step"] for line in Path("run/ledger.jsonl").read_text().splitlines()] == [3, 4]


def as_tree(dotted: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """{"lora": {"rank": 2}} of {"lora.rank": 2}."""
    tree: dict[str, dict[str, object]] = {}
    for key, value in dotted.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return tree


FREE: Mapping[str, object] = {
    "training.num_epochs": 9,
    "training.save_steps": 1,
    "training.keep_last": 1,
    "training.keep_best": False,
    "training.eval_steps": 1,
    "training.logging_steps": 1,
    "evaluation.sample_prompts": ["Who?"],
    "data.num_workers": 1,
    "run.tensorboard": False,
    "run.ledger": True,
}


def test_what_may_be_changed_is_told_and_changes_no_number(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Intervals, evaluation, callbacks, epochs beyond max_steps: each is listed, and every tensor is bit for bit."""
    quiet = {"evaluation.sample_tokens": 2, "training.schedule": "constant"}  # one that knows no end
    train(None, **quiet)
    Path("run").rename("whole")
    train(None, **quiet, training__max_steps=2)
    capsys.readouterr()
    train(**quiet, **FREE)
    told = capsys.readouterr().err
    assert [key for key in FREE if f"changed since the checkpoint: {key}: " not in told] == []
    assert "callbacks: [" in told
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        last = "checkpoints/step-00000004"
        assert tensors(Path("run", last, name)) == tensors(Path("whole", last, name))


def test_a_finished_run_is_a_no_op(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No step, no file touched but logs, the same result; the same run with more steps goes on."""
    options = {"evaluation__sample_prompts": ["Who?"], "evaluation__sample_tokens": 2, "run__ledger": True}
    first = train(None, **options)
    before = contents(workplace / "run", "logs", "tensorboard")
    again = train(**options)
    assert "this run has ended already (max_steps=4 reached): there is nothing left to do" in capsys.readouterr().err
    assert contents(workplace / "run", "logs", "tensorboard") == before
    assert [(r.steps, r.epochs, r.stop_reason, r.metrics, r.evaluation, r.counts) for r in (again,)] == [
        (first.steps, first.epochs, first.stop_reason, first.metrics, first.evaluation, first.counts)
    ]
    assert first.evaluation is not None
    more = train(**options, training__max_steps=6)
    assert (more.steps, more.stop_reason) == (6, "max_steps=6 reached")
    told = capsys.readouterr().err
    assert "max_steps: 4 → 6" in told
    assert "a learning rate that falls until the end of the run now does so until the new end" in told


def test_a_result_that_was_not_written_is_written(workplace: Path) -> None:
    """Killed between the last checkpoint and the result, or an older result is there: the resumed run completes it."""
    train(None)
    adapter = Path("run/adapter/adapters.safetensors")
    right = adapter.read_bytes()
    adapter.write_bytes(b"an older one")
    train()
    assert adapter.read_bytes() == right
    adapter.unlink()
    Path("run/adapter/adapter_config.json").unlink()
    train()
    assert adapter.read_bytes() == right


# Generic runs: any module, any loader.


def fit(folder: Path, *callbacks: Callback, module: ToyModule | None = None, **options: Any) -> ToyModule:
    """Train a regression with a checkpoint at each second step."""
    module = module or ToyModule()
    loader = ToyLoader(options.pop("batches", toy_batches()))
    Trainer(callbacks=[*callbacks, ModelCheckpoint(folder, every=2)], **options).fit(module, loader)
    return module


class Signs(Callback):
    """A transform of the user's own."""

    def transform_gradients(
        self, gradients: Gradients, context: StepContext
    ) -> tuple[Gradients, Mapping[str, mx.array]]:
        return gradients, {}


class Momentum(ToyModule):
    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        return optimizers.SGD(1e-2, momentum=0.9)


CHANGES: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "seed": (lambda at: fit(at, max_steps=4, resume="auto", seed=1), "seed: 42 → 1"),
    "accumulation": (lambda at: fit(at, max_steps=4, resume="auto", accumulate=2), "accumulate: 1 → 2"),
    "batches": (
        lambda at: fit(at, max_steps=4, resume="auto", batches=toy_batches((4, 3))),
        "batches_per_epoch: 7 → 2",
    ),
    "a constant rate": (
        lambda at: fit(at, max_steps=4, resume="auto", module=ToyModule(learning_rate=0.02)),
        "learning_rate: 0.01 → 0.02",
    ),
    "optimizer": (lambda at: fit(at, max_steps=4, resume="auto", module=Momentum()), "optimizer: AdamW → SGD"),
    "clipping": (
        lambda at: fit(at, GradientClipping(), max_steps=4, resume="auto"),
        "max_grad_norm: none → 1.0",
    ),
    "a transform": (lambda at: fit(at, Signs(), max_steps=4, resume="auto"), "Signs: none → transforms gradients"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_run_is_compared(change: str, tmp_path: Path) -> None:
    """What the trainer sees itself, without a fingerprint of the user's."""
    fit(tmp_path, max_steps=2)
    again, told = CHANGES[change]
    with pytest.raises(CheckpointError, match=re.escape(told)):
        again(tmp_path)


@pytest.mark.parametrize("allowed", ["learning_rate", "all"])
def test_an_allowed_change_has_its_effect(allowed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A constant rate is a part of the optimizer's saved state, and yet the new one is used; moments go on."""
    fit(tmp_path, max_steps=2)
    rates: list[float] = []
    note = LambdaCallback(on_log=lambda trainer, module, step, metrics: rates.append(metrics["train/lr"]))
    changed = ToyModule(learning_rate=0.02)
    fit(tmp_path, note, max_steps=4, log_every=1, resume="auto", module=changed, allow_changes=[allowed])
    assert rates == pytest.approx([0.02, 0.02])
    assert "resumed with another learning_rate: 0.01 → 0.02, which was allowed" in caplog.text
    state = mx.load(str(tmp_path / "checkpoints" / "step-00000004" / "optimizer.safetensors"))
    assert isinstance(state, dict)
    assert state["step"].item() == 4


def test_callbacks_come_and_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that leave gradients alone may be added, removed and put in another order; the training is the same."""
    whole = weights(fit(tmp_path / "whole", NaNGuard(), max_steps=6))
    fit(tmp_path / "parts", NaNGuard(), LambdaCallback("note"), max_steps=2)
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "parts", LambdaCallback("other"), NaNGuard(), max_steps=4, log_every=1, resume="auto")
    told = 'callbacks: ["ModelCheckpoint", "NaNGuard", "note"] → ["ModelCheckpoint", "NaNGuard", "other"]'
    assert told in caplog.text
    assert weights(fit(tmp_path / "parts", NaNGuard(), max_steps=6, resume="auto")) == whole


def test_a_checkpoint_that_tells_nothing_is_resumed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As an earlier version of this package wrote it."""
    fit(tmp_path, max_steps=2)

    def write(directory: Path) -> None:
        for path in (tmp_path / "checkpoints" / "step-00000002").glob("[!m]*"):  # a manifest of its own will come
            (directory / path.name).write_bytes(path.read_bytes())
        state = json.loads((directory / "state.json").read_text())
        for name in ("fingerprint", "settings", "config", "metrics", "evaluation"):
            del state[name]
        (directory / "state.json").write_text(json.dumps(state))

    (tmp_path / "checkpoints" / ".run").unlink()
    CheckpointStore(tmp_path / "checkpoints").save(2, write)
    fit(tmp_path, max_steps=4, resume="auto", seed=1)
    assert "does not say what it was trained with, so nothing can be compared" in caplog.text


def test_the_sum_of_bits_sees_every_bit() -> None:
    """Any one bit of any parameter that does not train makes another sum; those that train make none."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model.layers[0].freeze()
    model.layers[0].set_dtype(mx.bfloat16)
    before = {name: value.item() for name, value in resuming.frozen_sums(model).items()}
    assert list(before) == ["layers.0.weight bfloat16 [2, 3]", "layers.0.bias bfloat16 [2]"]
    weight = model.layers[0].weight
    for bit in range(16):
        flipped = weight.view(mx.uint16) ^ mx.array([[0, 0, 0], [0, 1 << bit, 0]], mx.uint16)
        model.layers[0].weight = flipped.view(mx.bfloat16)
        after = {name: value.item() for name, value in resuming.frozen_sums(model).items()}
        assert [name for name in before if before[name] != after[name]] == ["layers.0.weight bfloat16 [2, 3]"]


def test_state_tells_what_the_run_is(tmp_path: Path) -> None:
    """state.json has fingerprint, settings, configuration and versions, as plain JSON."""
    fit(tmp_path, GradientClipping(0.5), max_steps=2, config={"lora": {"rank": 2}})
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert {name: state["fingerprint"][name] for name in ("seed", "optimizer", "betas", "max_grad_norm")} == {
        "seed": 42, "optimizer": "AdamW", "betas": [0.9, 0.999], "max_grad_norm": 0.5,
    }  # fmt: skip
    assert (state["settings"]["max_steps"], state["settings"]["total_steps"]) == (2, 2)
    assert state["config"] == {"lora": {"rank": 2}}
    assert state["versions"] == resuming.VERSIONS


def test_the_examples_in_docstrings_run() -> None:
    """Each gives what it shows."""
    assert doctest.testmod(resuming).failed == 0
