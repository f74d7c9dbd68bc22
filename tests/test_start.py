"""A training that begins at an adapter: what it begins with, when it does not, and what DPO then compares with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_trainer import build, cli, replaying, trained
from mlx_trainer.checkpoint import CheckpointError
from mlx_trainer.config import Config, LoRAConfig, load_config
from mlx_trainer.export.peft import to_peft
from mlx_trainer.models import ModelError
from mlx_trainer.models.lora import trainable
from mlx_trainer.monitoring import MetricsTracker
from mlx_trainer.preference import DPOModule
from mlx_trainer.traced import from_tree, to_tree
from tests.export.adapters import tensors, write_adapter
from tests.tiny import tiny_mistral

SETTINGS = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 128,
    "lora.rank": 2,
    "lora.alpha": 8.0,
    "lora.dropout": 0.0,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.max_steps": 5,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-2,
    "training.save_steps": 3,
    "training.eval_steps": 5,
    "training.logging_steps": 1,
    "data.train_split": 0.8,
    "run.tensorboard": False,
}
ALIKE = LoRAConfig(rank=2, alpha=8.0, dropout=0.0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter as it is written here, by PEFT and by mlx-lm, rows, and a run of DPO."""
    folder = tmp_path_factory.mktemp("start")
    mx.disable_compile()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_mistral(Path("base"), hidden_size=32)
        write_adapter(Path("base"), Path("sft"), ALIKE)
        to_peft(Path("sft"), Path("peft"))
        shutil.copytree("sft", "theirs")
        told = json.loads(Path("sft/adapter_config.json").read_text())
        del told["lora"]  # which mlx-lm itself does not write
        Path("theirs/adapter_config.json").write_text(json.dumps(told))
        chats = [{"prompt": "dog " * (n % 7), "completion": f"the sum is {n}"} for n in range(20)]
        pairs = [{"prompt": "dog " * (n % 7) + str(n), "chosen": f"it is {n}", "rejected": "no"} for n in range(20)]
        for name, rows in {"chats.jsonl": chats, "prefs.jsonl": pairs}.items():
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        build.train(preferences())
    return folder


@pytest.fixture(autouse=True)
def at_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)


def config(run: str, **overrides: object) -> Config:
    """A training of four seconds' worth on the chats; `lora__rank=8` sets lora.rank."""
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(overrides=SETTINGS | {"data.dataset_path": "chats.jsonl", "run.directory": run} | given)


def preferences(run: str = "dpo", **overrides: object) -> Config:
    """The same on preferences, beginning at `sft`."""
    given = {"training__method": "dpo", "data__dataset_path": "prefs.jsonl", "training__adapter": "sft"}
    return config(run, **(given | overrides))


def adapters(folder: str) -> dict[str, mx.array]:
    """The tensors of an adapter."""
    return tensors(Path(folder, "adapters.safetensors"))


@pytest.mark.parametrize("adapter", ["sft", "peft", "theirs"])
def test_training_begins_at_the_adapter(adapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With next to no learning the result is what it began with, in every layout; the log says where that was."""
    still = {"training__learning_rate": 1e-9, "training__max_steps": 1}
    build.train(config(f"at-{adapter}", training__adapter=adapter, **still))
    found, begun = (
        tensors(Path(f"at-{adapter}/adapter/adapters.safetensors")),
        tensors(Path("sft/adapters.safetensors")),
    )
    assert found.keys() == begun.keys()
    assert all(mx.allclose(found[name], begun[name], rtol=1e-6, atol=1e-7).item() for name in begun)
    told = capsys.readouterr().err
    assert f"INFO Training begins at the adapter in {adapter}, with a new optimizer.\n" in told
    assert "was trained on" not in told


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"lora__use_dora": True},
    "pissa": {"lora__init_lora_weights": "pissa"},
    "ranks by their root": {"lora__use_rslora": True, "lora__rank_pattern": {"v_proj": 3}},
    "one block": {"training__trainable_layers": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_trained_on(kind: str) -> None:
    """By the options that it was trained with, also with DPO, which begins without a margin."""
    build.train(config(f"{kind} first", training__max_steps=2, **KINDS[kind]))
    begun = {"training__adapter": f"{kind} first/adapter", **KINDS[kind]}
    build.train(config(f"{kind} on", training__learning_rate=1e-9, training__max_steps=1, **begun))
    ends = [adapters(f"{kind} {run}/adapter") for run in ("first", "on")]
    assert all(mx.allclose(ends[1][name], value, rtol=1e-5, atol=1e-7).item() for name, value in ends[0].items())
    preferring = preferences(f"{kind} dpo", training__max_steps=2, **begun)
    build.train(preferring)
    margins = MetricsTracker.read(Path(f"{kind} dpo/metrics.jsonl")).series("train/rewards/margins")[1]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert abs(margins[1]) > 1e-3
    assert trained.evaluate(preferring, f"{kind} first/adapter").metrics["rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )


def test_a_resumed_run_needs_the_adapter_no_more() -> None:
    """It is read where --resume auto finds no checkpoint; afterwards it may be gone, and the run ends bit for bit."""
    shutil.copytree("sft", "gone")
    whole = {"training__adapter": "sft", "training__schedule": "constant"}
    parts = whole | {"training__adapter": "gone", "run__resume": "auto"}
    build.train(config("whole", **whole))
    build.train(config("parts", training__max_steps=3, **parts))
    shutil.rmtree("gone")
    build.train(config("parts", **parts))
    ends = [adapters(f"{run}/adapter") for run in ("whole", "parts")]
    assert all(mx.array_equal(ends[0][name], ends[1][name]).item() for name in ends[0])
    assert [replaying.replay("whole", step).logged[step] for step in (2, 5)] == [True, True]


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"lora__rank": 4}, r"sft has lora\.rank 2 on .*\.0\.self_attn\.q_proj and this training 4; set it so"),
    "alpha": (
        {"lora__alpha": 4.0},
        r"sft has a scale \(lora\.alpha / lora\.rank\) of 4\.0 on .*ing 2\.0",
    ),
    "dora": ({"lora__use_dora": True}, r"sft has lora\.use_dora false on .* and this training true"),
    "start": ({"lora__init_lora_weights": "olora"}, r"sft has lora\.init_lora_weights default .* pissa or olora"),
    "more": (
        {"lora__target_modules": ("q_proj", "v_proj", "up_proj")},
        r"^this training has an adapter on model\.layers\.0\.mlp\.up_proj and sft has none \(2 such layers\)",
    ),
    "fewer": (
        {"lora__layers_to_transform": (1,)},
        r"^sft has an adapter on model\.layers\.0\.self_attn\.q_proj and this training has none \(2 such layers\)",
    ),
    "absent": ({"training__adapter": "nowhere"}, r"nowhere/adapter_config\.json: .*an adapter is a folder with this"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_adapter_of_another_kind_is_refused(other: str) -> None:
    """By the option to set, before anything is written."""
    options, message = OTHERS[other]
    with pytest.raises(ModelError, match=message):
        build.train(config("refused", **{"training__adapter": "sft", **options}))
    assert not Path("refused").exists()


def test_weights_trained_in_full_are_no_adapter() -> None:
    """They are refused with what to do instead."""
    build.train(config("last", training__method="full", training__trainable_layers=1, training__max_steps=1))
    with pytest.raises(ModelError, match=r"last/adapter holds weights trained in full and no adapter.*merge"):
        build.train(config("refused", training__adapter="last/adapter"))


def test_an_adapter_of_another_base_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers fit, so that it can be meant: a warning names both."""
    write_adapter(Path("base"), Path("elsewhere"), ALIKE, named="owner/other")
    build.train(config("told", training__adapter="elsewhere", training__max_steps=1))
    told = capsys.readouterr().err
    assert "WARNING elsewhere was trained on owner/other, and training goes on with base.\n" in told


def test_the_command_line_has_a_short_name(capsys: pytest.CaptureFixture[str]) -> None:
    """`--adapter DIR` is `training.adapter`, also in what is printed."""
    assert cli.main(["train", "chats.jsonl", "--adapter", "sft", "--print-config"]) == 0
    assert "\n  adapter: sft\n" in capsys.readouterr().out


@pytest.mark.parametrize("adapter", ["sft", "peft", "theirs"])
def test_on_the_command_line_the_adapter_brings_its_base_and_its_lora(
    adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three layouts; an option wins, and with a recipe all of it is the recipe's."""
    given = ["train", "chats.jsonl", "--adapter", adapter, "--print-config"]
    assert cli.main(given) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    printed = load_config("printed.yaml")
    assert (printed.model.model_name, printed.lora.rank, printed.lora.alpha) == ("base", 2, 8.0)
    others = {
        key: value for key, value in SETTINGS.items() if not key.startswith("lora.") and key != "model.model_name"
    }
    build.train(load_config("printed.yaml", overrides=others | {"run.directory": f"brought {adapter}"}))
    assert cli.main([*given, "--lora.alpha", "4", "--model", "other"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    printed = load_config("printed.yaml")
    assert (printed.model.model_name, printed.lora.rank, printed.lora.alpha) == ("other", 2, 4.0)
    Path("recipe.yaml").write_text("data: {dataset_path: chats.jsonl}\n")
    assert cli.main(["train", "recipe.yaml", *given[2:]]) == 0
    assert "  rank: 16\n" in capsys.readouterr().out


# Preferences: the reference is what training began at.


def perturbed(module: DPOModule) -> DPOModule:
    """The module with other adapters than it had, as after some training."""
    for value in trainable(module.model).values():
        value[:] = value + 0.05 * mx.random.normal(value.shape, key=mx.random.key(value.size))
    return module


def reference_of(found: Config, change: Callable[[DPOModule], DPOModule] = lambda module: module) -> list[float]:
    """The reference's log-probabilities of a batch, of the module that `found` prepares and `change` changes."""
    module = build.build_module(found)
    assert isinstance(module, DPOModule)
    data = build.build_data(found, module)
    build.prepare(found, module, data)
    batch = from_tree(to_tree(next(iter(data.train_loader()))))
    reference: list[float] = change(module).reference(batch).tolist()
    return reference


def test_the_reference_is_the_adapter_that_training_began_at() -> None:
    """However it has changed since: what another module computes with that adapter, and neither base nor policy."""
    found = preferences()
    module = build.build_module(found)
    assert isinstance(module, DPOModule)
    module.load(Path("sft"))
    batch = from_tree(to_tree(next(iter(build.build_data(found, module).train_loader()))))
    expected = module.score(batch).log_probabilities.tolist()
    assert reference_of(found) == reference_of(found, perturbed) == pytest.approx(expected, rel=1e-5)
    without = reference_of(preferences(training__adapter=None))
    assert without != pytest.approx(expected, rel=1e-3)
    before = preferences(preference__precompute_ref_log_probs=True)
    assert reference_of(before) == pytest.approx(expected, rel=1e-5)
    base = preferences(preference__precompute_ref_log_probs=True, training__adapter=None)
    assert reference_of(base) == pytest.approx(without, rel=1e-5)  # kept beside the other's, and not taken for it


def test_dpo_begins_without_a_margin() -> None:
    """In the first step no answer is preferred to what the adapter prefers; later it is."""
    tracker = MetricsTracker.read(Path("dpo/metrics.jsonl"))
    margins, losses = (tracker.series(f"train/{name}")[1] for name in ("rewards/margins", "loss"))
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert margins[-1] > 0.01


def test_evaluate_has_the_same_reference(capsys: pytest.CaptureFixture[str]) -> None:
    """What a run logged at its end; and of the adapter it began at, no margin at all."""
    told = {}
    for adapter in ("dpo/adapter", "sft"):
        assert cli.main(["evaluate", "dpo/config.yaml", "--adapter", adapter]) == 0
        told[adapter] = dict(line.split() for line in capsys.readouterr().out.splitlines())
    tracker = MetricsTracker.read(Path("dpo/metrics.jsonl"))
    logged = {name: tracker.series(f"val/{name}")[1][-1] for name in ("loss", "rewards/margins")}
    assert told["dpo/adapter"]["loss"] == f"{logged['loss']:.4f}"
    assert told["dpo/adapter"]["margin"] == f"{logged['rewards/margins']:.4f}"
    assert (told["sft"]["loss"], told["sft"]["margin"].lstrip("-")) == ("0.6931", "0.0000")
    assert told["dpo/adapter"]["margin"] != "0.0000"


@pytest.mark.parametrize("step", [2, 5])
def test_a_step_is_replayed_with_this_reference(step: int) -> None:
    """From the beginning and from a checkpoint, bit for bit."""
    assert replaying.replay("dpo", step).logged[step]


def test_a_resumed_run_has_the_same_reference_or_none() -> None:
    """The adapter is read again for it, and another one in its place is refused by name."""
    shutil.copytree("sft", "moved")
    build.train(preferences("resumed", training__adapter="moved", training__max_steps=3))
    more = preferences("resumed", training__adapter="moved", run__resume="auto", training__schedule="cosine")
    build.train(more)
    write_adapter(Path("base"), Path("moved"), ALIKE, seed=1)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*: reference: \w{16} → \w{16}"):
        build.train(more)
