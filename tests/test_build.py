"""From a configuration to a run: every option reaches its place, and a refused run leaves nothing behind."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import asdict

from mlx_trainer import build, cli, run_folder
from mlx_trainer.checkpoint import CheckpointError
from mlx_trainer.config import AdaLoRAConfig, Config, ConfigError, LoRAConfig, ModelConfig, load_config
from mlx_trainer.config.keys import keys
from mlx_trainer.models import CausalLMModule, MistralLoRAModule, ModelError
from mlx_trainer.trainer import Trainer, TrainingError
from tests.tiny import tiny_mistral

QUICK = {
    "model.model_name": "base",
    "model.dtype": "float32",
    "model.max_seq_length": 64,
    "lora.rank": 2,
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 1,
    "training.max_steps": 2,
    "training.warmup_steps": 0,
    "training.learning_rate": 1e-2,
    "data.dataset_path": "chats.jsonl",
    "data.train_split": 0.75,
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder that holds a tiny model, `base`, and eight chats of uneven length, `chats.jsonl`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    tiny_mistral(tmp_path / "base")
    rows = [
        {"messages": [{"role": "user", "content": "dog " * n}, {"role": "assistant", "content": f"the sum is {n}"}]}
        for n in range(1, 9)
    ]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(**overrides: object) -> Config:
    """Return a configuration that trains in a second; `lora__rank=8` sets lora.rank."""
    return load_config(overrides=QUICK | {key.replace("__", "."): value for key, value in overrides.items()})


def callbacks(found: Config, **more: bool) -> dict[str, Any]:
    """Return the callbacks that a configuration asks for, by the names of their classes."""
    return {type(each).__name__: each for each in build.build_callbacks(found, **more)}


def arrived(found: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Return, for each option, the value that reached the place where it works."""
    module = build.build_module(found)
    trainer = build.build_trainer(found, Path("run"))
    by_name = callbacks(found)
    monkeypatch.setattr(build, "DataPipeline", lambda path, tokenizer, **given: {"dataset_path": path, **given})
    data: Any = build.build_data(found, module)
    computed: list[object] = []
    monkeypatch.setattr(build, "precompute_reference", lambda *given: computed.append(given))
    begun: list[Path] = []
    monkeypatch.setattr(build, "begin_at", lambda adapter, _: begun.append(adapter))
    monkeypatch.setattr(module, "setup", lambda stage: None)
    build.prepare(found, module, data)
    samples, checkpoints = by_name.get("SampleGenerator"), by_name["ModelCheckpoint"]
    lora = module.lora or LoRAConfig(rank=1)
    return {
        "model.model_name": module.name,
        "model.cache_dir": module.cache_dir,
        "model.revision": module.revision,
        "model.dtype": module.dtype,
        "model.max_seq_length": module.max_seq_length if module.max_seq_length == data["max_seq_length"] else None,
        "model.trust_remote_code": module.trust_remote_code,
        "model.verify": module.verify,
        "lora.rank": lora.rank,
        "lora.alpha": lora.alpha,
        "lora.dropout": lora.dropout,
        "lora.target_modules": lora.target_modules,
        "lora.layers_to_transform": lora.layers_to_transform,
        "lora.use_rslora": lora.use_rslora,
        "lora.use_dora": lora.use_dora,
        "lora.init_lora_weights": lora.init_lora_weights,
        "lora.rank_pattern": lora.rank_pattern,
        "lora.alpha_pattern": lora.alpha_pattern,
        **{f"adalora.{name}": value for name, value in asdict(getattr(module, "adalora", AdaLoRAConfig())).items()},
        "training.method": module.fingerprint()["method"],
        "training.adapter": str(begun[0]) if begun else None,
        "training.batch_size": data["batch_size"],
        "training.batch_tokens": data["batch_tokens"],
        "training.gradient_accumulation_steps": trainer.accumulate,
        "training.num_epochs": trainer.limits.max_epochs,
        "training.max_steps": trainer.limits.max_steps,
        "training.optimizer": module._optimization["name"],
        "training.schedule": module._optimization["schedule"],
        "training.learning_rate": module._optimization["learning_rate"],
        "training.warmup_steps": module._optimization["warmup_steps"],
        "training.weight_decay": module._optimization["weight_decay"],
        "training.loraplus_lr_ratio": module._optimization["loraplus_lr_ratio"],
        "training.neftune_noise_alpha": module.neftune_noise_alpha,
        "training.ema_decay": by_name["EMA"].decay if "EMA" in by_name else None,
        "training.trainable_layers": module.trainable_layers,
        "training.max_grad_norm": by_name["GradientClipping"].max_norm if "GradientClipping" in by_name else None,
        "training.nan_patience": by_name["NaNGuard"].patience,
        "training.nan_rollback": by_name["NaNGuard"].rollback,
        "training.loss_spike": by_name["LossSpike"].policy if "LossSpike" in by_name else None,
        "training.recompute": module.recompute,
        "training.save_steps": checkpoints.every,
        "training.keep_last": checkpoints.keep_last,
        "training.keep_best": checkpoints.monitor == "val/loss",
        "training.eval_steps": by_name["Evaluation"].every,
        "training.logging_steps": trainer.log_every,
        "preference.beta": getattr(module, "beta", None),
        "preference.loss_type": getattr(module, "loss_type", None),
        "preference.label_smoothing": getattr(module, "label_smoothing", None),
        "preference.precompute_ref_log_probs": computed != [],
        "preference.orpo_lambda": getattr(module, "orpo_lambda", None),
        "data.dataset_path": data["dataset_path"],
        "data.validation_path": data["validation_path"],
        "data.fields": data["fields"],
        "data.roles": data["roles"],
        "data.completion_style": data["completion_style"],
        "data.truncation": data["truncation"],
        "data.max_bad_share": data["max_bad_share"],
        "data.layout": data["layout"],
        "data.max_shapes": data["max_shapes"],
        "data.train_split": data["train_split"],
        "data.shuffle": data["shuffle"],
        "data.seed": data["seed"] if data["seed"] == trainer.seed == module.seed else None,
        "data.num_workers": data["num_workers"],
        "data.cache_dir": data["cache_dir"],
        "evaluation.sample_prompts": tuple(samples.prompts) if samples else (),
        "evaluation.sample_tokens": samples.options["max_tokens"] if samples else 100,
        "evaluation.patience": by_name["EarlyStopping"].patience if "EarlyStopping" in by_name else None,
        "run.directory": str(build.run_directory(found)),
        "run.resume": trainer.resume,
        "run.memory_stop_percent": by_name["MemoryMonitor"].stop_percent,
        "run.allow_changes": trainer.allow_changes,
        "run.tensorboard": "TensorBoardLogger" in by_name,
        "run.ledger": "Ledger" in by_name,
    }


CHANGED: dict[str, object] = {
    "model.model_name": "./base",
    "model.cache_dir": "cache",
    "model.dtype": "bfloat16",
    "model.max_seq_length": 48,
    "model.trust_remote_code": True,
    "model.verify": True,
    "lora.rank": 8,
    "lora.alpha": 4.0,
    "lora.dropout": 0.25,
    "lora.target_modules": ("o_proj", "k_proj"),
    "lora.layers_to_transform": (1,),
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.init_lora_weights": "olora",
    "lora.rank_pattern": {"v_proj": 2},
    "lora.alpha_pattern": {"v_proj": 2.0},
    "adalora.target_r": 1,
    "adalora.tinit": 1,
    "adalora.tfinal": 1,
    "adalora.deltaT": 3,
    "adalora.beta1": 0.5,
    "adalora.beta2": 0.5,
    "adalora.orth_reg_weight": 0.25,
    "training.method": "full",
    "training.adapter": "sft",
    "training.batch_size": 3,
    "training.batch_tokens": 4096,
    "training.gradient_accumulation_steps": 5,
    "training.num_epochs": 7,
    "training.max_steps": 9,
    "training.optimizer": "lion",
    "training.schedule": "linear",
    "training.learning_rate": 3e-4,
    "training.warmup_steps": 1,
    "training.weight_decay": 0.5,
    "training.loraplus_lr_ratio": 16.0,
    "training.neftune_noise_alpha": 5.0,
    "training.ema_decay": 0.9,
    "training.trainable_layers": 1,
    "training.max_grad_norm": None,
    "training.nan_patience": 5,
    "training.nan_rollback": True,
    "training.loss_spike": "skip",
    "training.recompute": "mlp",
    "training.save_steps": 11,
    "training.keep_last": 4,
    "training.keep_best": False,
    "training.eval_steps": 13,
    "training.logging_steps": 17,
    "preference.beta": 0.3,
    "preference.loss_type": "hinge",
    "preference.label_smoothing": 0.2,
    "preference.precompute_ref_log_probs": True,
    "preference.orpo_lambda": 0.5,
    "data.dataset_path": "./chats.jsonl",
    "data.validation_path": "held_out.jsonl",
    "data.fields": {"prompt": "question"},
    "data.roles": {"bot": "assistant"},
    "data.completion_style": "raw",
    "data.truncation": "split",
    "data.max_bad_share": 0.5,
    "data.layout": "padded",
    "data.max_shapes": 4,
    "data.train_split": 0.5,
    "data.shuffle": False,
    "data.seed": 3,
    "data.num_workers": 1,
    "data.cache_dir": "elsewhere",
    "evaluation.sample_prompts": ("Who?", "Why?"),
    "evaluation.sample_tokens": 12,
    "evaluation.patience": 6,
    "run.directory": "elsewhere",
    "run.resume": "auto",
    "run.memory_stop_percent": 95.0,
    "run.allow_changes": ("learning_rate",),
    "run.tensorboard": False,
    "run.ledger": True,
}
NEEDED_TOO: dict[str, dict[str, object]] = {
    "evaluation.sample_tokens": {"evaluation.sample_prompts": ["Who?"]},
    **{
        f"adalora.{name}": {"adalora.target_r": 2}
        for name in ("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")
    },
    "preference.beta": {"training.method": "dpo"},
    "preference.loss_type": {"training.method": "dpo"},
    "preference.label_smoothing": {"training.method": "dpo"},
    "preference.precompute_ref_log_probs": {"training.method": "dpo"},
    "preference.orpo_lambda": {"training.method": "orpo"},
}


@pytest.mark.parametrize("key", CHANGED)
def test_an_option_changes_what_it_names(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value other than the usual one reaches the place where it works, and nothing else moves."""
    before = arrived(load_config(overrides=QUICK | NEEDED_TOO.get(key, {})), monkeypatch)
    after = arrived(load_config(overrides=QUICK | NEEDED_TOO.get(key, {}) | {key: CHANGED[key]}), monkeypatch)
    assert after[key] == CHANGED[key] != before[key]
    followers = {"training.method": {"lora.rank", "lora.alpha", "lora.dropout", "lora.target_modules"}}
    moved = {name for name in after if after[name] != before[name]} - followers.get(key, set())
    assert moved == {key}


def test_every_option_is_tried() -> None:
    """No key of the schema is without its place; `model.revision` needs a Hub name, see below."""
    assert CHANGED.keys() | {"model.revision"} == keys().keys()


def test_a_revision_reaches_the_module() -> None:
    """A local folder has no revisions, so the module itself refuses it by name."""
    with pytest.raises(ModelError, match="revision 'v2' was given, but base is a local folder"):
        build.build_module(config(model__revision="v2"))


def test_the_cache_is_the_librarys_own_unless_named() -> None:
    """The default is passed as None, so that HF_HOME and its kin stay in force."""
    assert build.base_arguments(ModelConfig())["cache_dir"] is None
    assert build.base_arguments(ModelConfig(cache_dir="/data/hub"))["cache_dir"] == "/data/hub"


def test_mistral_with_adapters_gets_its_own_module() -> None:
    """MistralLoRAModule for a Mistral with LoRA, CausalLMModule for all else."""
    settings = json.loads(Path("base/config.json").read_text())
    assert type(build.build_module(config())) is MistralLoRAModule
    assert type(build.build_module(config(training__method="full"))) is CausalLMModule
    Path("base/config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    assert type(build.build_module(config())) is CausalLMModule


def test_the_callbacks_of_a_run_without_held_out_rows() -> None:
    """Nothing that needs an evaluation is there, and answers come by steps."""
    prompts = config(evaluation__sample_prompts=["Who?"], evaluation__patience=2)
    assert list(callbacks(prompts)) == [
        "NaNGuard", "MemoryMonitor", "ProgressBar", "MetricsLogger", "GradientClipping",
        "Evaluation", "EarlyStopping", "SampleGenerator", "TensorBoardLogger", "ModelCheckpoint",
    ]  # fmt: skip
    without = callbacks(prompts, evaluating=False)
    assert callbacks(prompts).keys() - without.keys() == {"Evaluation", "EarlyStopping"}
    assert (without["SampleGenerator"].every, without["ModelCheckpoint"].monitor) == (50, None)


def test_a_run_leaves_a_complete_folder() -> None:
    """Configuration, environment, metrics, TensorBoard files, checkpoints, adapter and report, as the design says."""
    found = config(run__directory="runs/one", evaluation__sample_prompts=["dog"], evaluation__sample_tokens=2)
    result = build.train(found)
    folder = Path("runs/one")
    assert result.steps == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "checkpoints", "config.yaml", "environment.json",
        "logs", "metrics.jsonl", "report.html", "samples.jsonl", "tensorboard",
    ]  # fmt: skip
    assert load_config(folder / "config.yaml") == found
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["seed"], environment["data"]["rows"], environment["data"]["train_rows"]) == (42, 8, 6)
    assert "<h2>Data</h2>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("told", ["{}", "[]", "{", '{"model": {"name": "owner/base", "revision": null}}'])
def test_a_run_that_tells_no_commit_goes_on_as_the_recipe_says(told: str) -> None:
    """Damaged, of another program or of a folder's model: its weights are compared with the checkpoint in any case."""
    Path("one/checkpoints/step-00000001").mkdir(parents=True)
    Path("one/environment.json").write_text(told)
    found = config(run__directory="one", run__resume="auto", model__model_name="owner/base")
    assert run_folder.as_begun(found, Path("one")) == found


def test_only_a_run_that_goes_on_keeps_its_commit() -> None:
    """Not a new one in the same folder, nor one that names a revision, another model, or a folder."""
    Path("one/environment.json").parent.mkdir()
    Path("one/environment.json").write_text('{"model": {"name": "owner/base", "revision": "abc"}}')
    goes_on = {"run__directory": "one", "run__resume": "auto", "model__model_name": "owner/base"}

    def revision(**options: object) -> str | None:
        return run_folder.as_begun(config(**(goes_on | options)), Path("one")).model.revision

    assert revision() is None
    Path("one/checkpoints/step-00000001").mkdir(parents=True)
    assert revision() == "abc"
    assert revision(model__revision="v2") == "v2"
    others = [{"run__resume": None}, {"model__model_name": "owner/other"}, {"model__model_name": "base"}]
    assert [revision(**other) for other in others] == [None] * 3


def test_a_report_is_left_however_a_run_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that fails leaves its report too, and a report that cannot be written hides no error."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(TrainingError, match="not finite"):
        build.train(config(run__directory="runs/one"))
    assert Path("runs/one/report.html").exists()
    run_folder.leave_report(tmp_path / "absent")
    assert "there is no run folder" in caplog.text


def test_the_first_rows_are_shown_before_training_and_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On stderr after the figures, long ones by their ends, and in no log file; the folder has more of them."""
    monkeypatch.setenv("HF_TOKEN", "my secret token")
    row = {"prompt": "dog " * 2000 + "my secret token", "completion": "the end"}
    Path("chats.jsonl").write_text((json.dumps(row) + "\n") * 2)
    build.train(config(run__directory="one", model__max_seq_length=9000, data__train_split=0.5, training__max_steps=1))
    told = capsys.readouterr().err
    shown = told.partition("\n\n")[2].partition("⟧\n")[0]
    assert " INFO optimizer steps: 1 per epoch, 1 in all\n\nchats.jsonl:" in told
    assert shown.startswith("chats.jsonl:")
    assert ", trained between ⟦ and ⟧:\n<s>[INST] dog dog " in shown
    assert re.search(r" \[… 7,\d\d\d characters left out …\] ", shown)
    assert shown.endswith("[hidden][/INST]⟦ the end</s>")
    assert not any("dog dog" in path.read_text() for path in Path("one/logs").iterdir())
    kept = Path("one/environment.json").read_text()
    assert ("secret" in kept, len(json.loads(kept)["data"]["examples"]), kept.count("dog ")) == (False, 1, 2000)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/chats.jsonl.gz", "chats"),
        ("chats.v2.jsonl", "chats.v2"),
        (["b.jsonl", "a.jsonl"], "b"),
        ({"b.jsonl": 2, "a.jsonl": 1}, "b"),
        ("hf:owner/name", "name"),
        ("hf:owner/name:config", "name-config"),
        ("logs/*.jsonl", "logs"),
        ("logs/2026-[01]*.jsonl", "2026--01"),
        ("v1.jsonl/", "v1.jsonl"),
    ],
)
def test_a_run_is_named_after_its_first_data(path: Any, name: str) -> None:
    """File, folder, dataset or pattern: the run folder's name is one that a folder can have."""
    Path("v1.jsonl").mkdir()
    assert build.run_directory(config(data__dataset_path=path)) == Path("runs") / name


def test_the_current_folder_gives_its_own_name(tmp_path: Path) -> None:
    """`.` is not runs/ itself."""
    assert build.run_directory(config(data__dataset_path=".")) == Path("runs") / tmp_path.name


def test_runs_without_a_name_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/chats, then runs/chats-2; the folder's own configuration names the folder, so that it can be continued."""
    assert build.run_directory(config()) == Path("runs/chats")
    build.train(config())
    assert load_config("runs/chats/config.yaml").run.directory == "runs/chats"
    assert build.run_directory(config()) == Path("runs/chats-2")
    assert build.run_directory(config(run__resume="auto")) == Path("runs/chats")


def test_a_run_is_continued_where_it_ended() -> None:
    """`--resume auto` goes on from the newest checkpoint; without it, a folder that holds a run is refused."""
    build.train(config(run__directory="one"))
    with pytest.raises(ConfigError) as caught:
        build.train(config(run__directory="one"))
    assert str(caught.value) == "one: holds an earlier run; continue it with --resume auto, or name another --output"
    result = build.train(config(run__directory="one", run__resume="auto", training__max_steps=3))
    assert result.steps == 3
    steps = [json.loads(line)["step"] for line in Path("one/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 3


def test_a_checkpoint_that_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """A wrong --resume path costs no run folder."""
    with pytest.raises(CheckpointError, match="none is no complete checkpoint"):
        build.train(config(run__directory="one", run__resume="none"))
    assert not Path("one").exists()


INSPECT = ("inspect", "chats.jsonl", "--model", "base", "--model.max_seq_length", "64", "--data.train_split", "0.75")


def test_inspect_prints_the_report_without_reading_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Configuration and tokenizer are enough; two rows are shown unless told otherwise, and nothing is written."""
    Path("base/model.safetensors").unlink()
    before = sorted(Path().rglob("*"))
    assert cli.main(INSPECT) == 0
    captured = capsys.readouterr()
    summary = build.inspect(config()).summary
    assert (captured.out, captured.err) == (
        f"{summary}\n"
        "48.5% of the tokens are trained\n"
        "batches per epoch: 3; 29.2% padding, 1.41 positions computed per token\n"
        "1 shape, compiled once: 2×24 rows×tokens\n"
        "optimizer steps: 1 per epoch, 3 in all\n"
        "warning: 29.2% of the positions are padding, more than 25%; each row is padded to the next of few lengths: "
        "smaller batches give less, and where all data.max_shapes shapes are in use, more of them\n"
        "\nchats.jsonl:1, trained between ⟦ and ⟧:\n<s>[INST] dog [/INST]⟦ the sum is 1</s>⟧\n"
        "\nchats.jsonl:3, trained between ⟦ and ⟧:\n<s>[INST] dog dog dog [/INST]⟦ the sum is 3</s>⟧\n",
        "",
    )
    assert cli.main([*INSPECT, "--rows", "0"]) == 0
    assert capsys.readouterr().out == captured.out.partition("\nchats.jsonl")[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("options", [{"max_steps": None, "num_epochs": 2}, {"max_steps": 3}, {"batch_size": 1}])
def test_inspect_tells_what_the_training_does(
    options: dict[str, int | None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps are those that are taken; the training logs each line once and keeps the figures in its folder."""
    sizes = {"gradient_accumulation_steps": 2} | options
    found = config(run__directory="one", **{f"training__{name}": value for name, value in sizes.items()})
    report = build.inspect(found)
    assert report.total_steps == build.train(found).steps
    told = capsys.readouterr().err
    assert f": {report.steps_per_epoch} steps per epoch, each of 2 micro-batches" in told
    assert [told.count(f" INFO {line}\n") for line in report.lines()] == [1] * len(report.lines())
    assert json.loads(Path("one/environment.json").read_text())["data"] == build.inspect(found).as_dict()


def test_inspect_takes_several_files_with_names_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, fields, roles, truncation, shapes and batches in tokens: what the report says follows them."""
    rows = [{"question": "dog " * n, "answer": f"sum {n}"} for n in range(10, 40)]
    Path("more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bots = [{"messages": [{"role": "me", "content": "dog " * n}, {"role": "bot", "content": "sum"}]} for n in (5, 99)]
    Path("bots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bots))
    arguments = (
        "inspect", "chats.jsonl=2", "more.jsonl=0.5", "bots.jsonl", "--model", "base", "--model.max_seq_length", "64",
        "--data.fields", "prompt=question", "completion=answer", "--data.roles", "me=user", "bot=assistant",
        "--data.truncation", "drop", "--data.max_shapes", "2", "--data.train_split", "1", "--data.cache_dir", "kept",
        "--training.batch_tokens", "128", "--json",
    )  # fmt: skip
    assert cli.main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["train_rows"], report["bad_rows"], report["dropped_rows"]) == (40, 39, 0, 1)
    assert sum(shape["batches"] for shape in report["used_shapes"]) == report["batches"]
    assert report["shapes"] == len(report["used_shapes"]) <= 2
    assert all(shape["positions"] <= 128 for shape in report["used_shapes"])
    assert len(list(Path("kept/tokens").glob("*/store.json"))) == 3


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints one object: the report's."""
    assert cli.main([*INSPECT, "--json", "--rows", "3"]) == 0
    overrides = {"model.model_name": "base", "model.max_seq_length": 64, "data.train_split": 0.75}
    found = load_config(overrides=overrides | {"data.dataset_path": "chats.jsonl"})
    assert json.loads(capsys.readouterr().out) == build.inspect(found, rows=3).as_dict()


def test_strict_inspection_fails_where_there_are_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """With --strict the code is 1 where a warning is printed, else 0; without it always 0."""
    assert cli.main([*INSPECT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] != []
    assert [cli.main([*INSPECT, *more]) for more in ([], ["--strict"], ["--strict", "--json"])] == [0, 1, 1]
    fitting = ("--training.batch_size", "1", "--data.train_split", "1")
    assert cli.main([*INSPECT, *fitting, "--strict"]) == 0
    assert "warning: " not in capsys.readouterr().out.rpartition("8 rows")[2]


def test_inspect_refuses_what_training_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    """Missing data and a negative number of rows are a paragraph and code 2."""
    assert cli.main(["inspect", "none.jsonl", "--model", "base"]) == 2
    assert cli.main([*INSPECT, "--rows", "-1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    missing, negative = captured.err.splitlines()[-2:]
    assert missing.startswith("mlx-trainer: ")
    assert "none.jsonl" in missing
    assert negative == "mlx-trainer: --rows is -1; it must be a whole number, at least 0"


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that trains through the command line, must be refused, and returns the message."""

    def run(*arguments: str) -> str:
        before = sorted(Path().rglob("*"))
        model = [] if "--model" in arguments else ["--model", "base"]
        code = cli.main(["train", *model, "--model.dtype", "float32", "--training.max_steps", "1", *arguments])
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "")
        assert sorted(Path().rglob("*")) == before
        assert "Traceback" not in captured.err
        return captured.err.splitlines()[-1].removeprefix("mlx-trainer: ")

    return run


def test_bad_input_is_told_in_a_paragraph_and_leaves_nothing(refused: Callable[..., str]) -> None:
    """Missing, empty and broken data, wrong roles, folders that cannot be written, models that are none: code 2."""
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text('{"messages": [\n')
    Path("roles.jsonl").write_text('{"messages": [{"role": "usr", "content": "a"}]}\n')
    Path("hollow").mkdir()
    Path("hollow/config.json").write_text(Path("base/config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (Path("hollow") / name).write_text((Path("base") / name).read_text())
    messages = {
        "missing data": refused("none.jsonl"),
        "empty data": refused("empty.jsonl"),
        "broken data": refused("broken.jsonl"),
        "wrong roles": refused("roles.jsonl"),
        "file as folder": refused("chats.jsonl", "--output", "chats.jsonl/run"),
        "no model": refused("chats.jsonl", "--model", "./nothing"),
        "no weights": refused("chats.jsonl", "--model", "hollow"),
        "no layer": refused("chats.jsonl", "--lora.target_modules", "q_prj"),
    }
    parts = {
        "missing data": "none.jsonl",
        "empty data": "empty.jsonl",
        "broken data": "broken.jsonl:1",
        "wrong roles": "roles.jsonl:1",
        "file as folder": "chats.jsonl/run: cannot be made, because ",
        "no model": "There is no folder ./nothing.",
        "no weights": "hollow has no weights (model*.safetensors)",
        "no layer": "no layer is called q_prj. Did you mean q_proj?",
    }
    assert {name: part for name, part in parts.items() if part not in messages[name]} == {}, messages
