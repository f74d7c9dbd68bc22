"""Exact resume: of every configuration, at every step, with a tolerance of 0 (rows 33 to 38 of the matrix of faults).

A run of 200 steps keeps a checkpoint of every step. From each of them, k, a new trainer with a new module goes on for
three steps, and what it then would save is compared with what the unbroken run saved after step k+3: the bits of every
parameter and every part of the optimizer's state, random state, position, counts, callbacks, last log and evaluation,
and the ledger of rows. That is enough, by induction: what a checkpoint holds is all that decides on what follows, so
two runs that are equal in it at one step are equal at every later one. Some go on to the end nevertheless.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers
import pytest
from attrs import evolve, frozen

from mlx_trainer import (
    Callback,
    DataPipeline,
    Evaluation,
    GradientClipping,
    Ledger,
    LoRAConfig,
    MistralLoRAModule,
    ModelCheckpoint,
    NaNGuard,
    SampleGenerator,
    Trainer,
    TrainerModule,
)
from mlx_trainer.checkpoint import CheckpointStore
from mlx_trainer.monitoring.files import read_json_lines
from tests.faults.comparing import held
from tests.faults.conftest import Tell
from tests.tiny import tiny_mistral
from tests.toy import ToyLoader, ToyModule, toy_batches, with_nan

STEPS, FURTHER = 200, 3


class Regression(ToyModule):
    """The toy regression with an optimizer of choice, in a type of choice."""

    def __init__(self, optimizer: Callable[[int], optimizers.Optimizer], dtype: mx.Dtype = mx.float32) -> None:
        super().__init__()
        self.optimizer, self.dtype = optimizer, dtype

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.model.set_dtype(self.dtype)

    def configure_optimizer(self, total_steps: int | None) -> optimizers.Optimizer:
        return self.optimizer(total_steps or 0)


def warm(rate: float, steps: int) -> Any:
    """Warm-up and cosine."""
    schedules = [optimizers.linear_schedule(0, rate, 20), optimizers.cosine_decay(rate, steps - 20)]
    return optimizers.join_schedules(schedules, [20])


BATCHES = toy_batches((4, 3, 4, 2, 4, 4, 3))  # uneven, and 7 of them: windows of 2 or 4 end with a shorter one
HELD_OUT = toy_batches((3, 2), seed=1)
POISONED = [*BATCHES[:6], with_nan(BATCHES[6])]


@frozen
class Run:
    """A configuration. `module` and `data` are called with a folder of base models and rows."""

    module: Callable[[Path], TrainerModule]
    data: Callable[[Path], Any] = lambda _: ToyLoader(BATCHES)
    callbacks: Callable[[], Sequence[Callback]] = list
    accumulate: int = 1
    validation: Sequence[Any] | None = None


def regression(optimizer: Callable[[int], optimizers.Optimizer], dtype: mx.Dtype = mx.float32) -> Any:
    """A module that needs no folder."""
    return lambda _: Regression(optimizer, dtype)


LORA = LoRAConfig(rank=2, alpha=4, dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj"))
ODD = evolve(LORA, use_dora=True, init_lora_weights="pissa", use_rslora=True, rank_pattern={"down_proj": 3})


def mistral(base: str = "base", **options: Any) -> Callable[[Path], TrainerModule]:
    """A tiny Mistral with LoRA and dropout."""
    settings = {"lora": LORA, "dtype": "float32", "max_seq_length": 64, "learning_rate": 1e-2, "warmup_steps": 20}
    return lambda place: MistralLoRAModule(place / base, **{**settings, **options})


def chats(**options: Any) -> Callable[[Path], DataPipeline]:
    """Eleven chats of uneven length, three of them held out, two in a batch."""
    settings: dict[str, Any] = {"batch_size": 2, "max_seq_length": 64, "max_shapes": 3, "train_split": 0.75}

    def pipeline(place: Path) -> DataPipeline:
        tokenizer = MistralLoRAModule(place / "base").tokenizer
        return DataPipeline(place / "chats.jsonl", tokenizer, cache_dir=place / "cache", **{**settings, **options})

    return pipeline


RUNS: dict[str, Run] = {
    "AdamW, warm-up and cosine": Run(regression(lambda n: optimizers.AdamW(warm(1e-2, n), bias_correction=True))),
    "Adam, linear, accumulation 2": Run(
        regression(lambda n: optimizers.Adam(optimizers.linear_schedule(1e-2, 0, n))), accumulate=2
    ),
    "SGD with momentum, steps, accumulation 4": Run(
        regression(lambda n: optimizers.SGD(optimizers.step_decay(1e-3, 0.5, 50), momentum=0.9)), accumulate=4
    ),
    "Adafactor, bfloat16": Run(regression(lambda n: optimizers.Adafactor(), mx.bfloat16)),
    "Lion, a plain list": Run(regression(lambda n: optimizers.Lion(1e-3)), data=lambda _: BATCHES),
    "Muon, evaluation between steps": Run(
        regression(lambda n: optimizers.Muon(1e-3)), callbacks=lambda: [Evaluation(every=3)], validation=HELD_OUT
    ),
    "AdamW, NaN in each epoch, NaNGuard and clipping": Run(
        regression(lambda n: optimizers.AdamW(1e-2)),
        data=lambda _: ToyLoader(POISONED),
        callbacks=lambda: [NaNGuard(patience=5), GradientClipping(0.5)],
    ),
    "Mistral, unpadded": Run(mistral(), chats()),
    "Mistral, padded, accumulation 2, workers, evaluation": Run(
        mistral(schedule="linear"),
        chats(layout="padded", num_workers=2),
        callbacks=lambda: [Evaluation(every=5), GradientClipping(1.0)],
        accumulate=2,
    ),
    "Mistral, bfloat16, recompute mlp": Run(mistral(dtype="bfloat16", recompute="mlp"), chats()),
    "Mistral, recompute block, NaNGuard and clipping": Run(
        mistral(recompute="block"), chats(), callbacks=lambda: [NaNGuard(), GradientClipping(0.1)]
    ),
    "Mistral, 4-bit base, Lion": Run(mistral("four bits", optimizer="lion", schedule="constant"), chats()),
    "Mistral, PiSSA and DoRA of two ranks, recompute block": Run(mistral(lora=ODD, recompute="block"), chats()),
    "Mistral, all weights, Adafactor": Run(mistral(lora=None, optimizer="adafactor", warmup_steps=0), chats()),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two base models and a file of chats."""
    folder = tmp_path_factory.mktemp("place")
    tiny_mistral(folder / "base", hidden_size=32)
    tiny_mistral(folder / "four bits", hidden_size=64, layers=1, bits=4)
    said = [("dog " * n, "the sum is " + "more " * (n % 4)) for n in range(1, 12)]
    rows = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return folder


class Halt(Callback):
    """Writes what a checkpoint holds after step `step`, and ends the run there."""

    phase = "checkpoint"

    def __init__(self, step: int, directory: Path) -> None:
        self.step, self.directory = step, directory

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        if step == self.step:
            trainer.request_checkpoint()
            trainer.request_stop("as far as was asked for")

    def on_checkpoint(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        self.directory.mkdir()
        trainer.write_checkpoint(self.directory)


def fit(run: Run, place: Path, folder: Path, saving: Callback, resume: Path | None = None) -> None:
    """Train as `run` says, with a new module and new loaders, with a ledger in `folder`."""
    trainer = Trainer(
        max_epochs=1000,
        max_steps=STEPS,
        accumulate=run.accumulate,
        callbacks=[*run.callbacks(), Ledger(folder / "ledger.jsonl"), saving],
        log_every=1,
        resume=resume,
    )
    trainer.fit(run.module(place), run.data(place), run.validation)


@pytest.mark.parametrize("name", RUNS)
def test_resumed_at_any_step_a_run_is_the_unbroken_one(
    name: str, place: Path, tmp_path: Path, campaign: Callable[[int, int], int], tell: Tell
) -> None:
    """Bit for bit in all that a checkpoint holds, and in the ledger."""
    run, whole, parts = RUNS[name], tmp_path / "whole", tmp_path / "parts"
    fit(run, place, whole, ModelCheckpoint(whole, every=1, keep_last=None))
    ledger = read_json_lines(whole / "ledger.jsonl")
    saved = dict(enumerate(CheckpointStore(whole / "checkpoints").list(), 1))
    assert ([line["step"] for line in ledger], [*saved]) == ([*range(1, STEPS + 1)], [*range(1, STEPS + 1)])

    starts = range(1, STEPS, STEPS // campaign(10, STEPS))
    to_the_end = range(STEPS // 2 + 7, STEPS, campaign(100, 10))
    pairs = [(at, min(at + FURTHER, STEPS)) for at in starts] + [(at, STEPS) for at in to_the_end]
    for at, until in pairs:
        parts.mkdir()
        shutil.copy(whole / "ledger.jsonl", parts)  # it has gone on beyond the checkpoint, as before a kill
        fit(run, place, parts, Halt(until, parts / "held"), resume=saved[at])
        assert held(parts / "held") == held(saved[until]), f"{name}: from step {at} to step {until}"
        assert read_json_lines(parts / "ledger.jsonl") == ledger[:until]
        shutil.rmtree(parts)
    result = f"{len(starts)} of {len(starts)} bit-identical after {FURTHER} steps, {len(to_the_end)} at the end too"
    tell(f"Resumed at a step of {STEPS}: {name}", result)


def test_the_comparison_sees_one_bit(place: Path, tmp_path: Path) -> None:
    """Of any tensor, and of the random state: what the test above rests on."""
    run = RUNS["AdamW, warm-up and cosine"]
    fit(run, place, tmp_path, Halt(5, tmp_path / "held"))
    first = held(tmp_path / "held")
    path = tmp_path / "held" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    state = json.loads((tmp_path / "held" / "state.json").read_text())
    state["random_state"] ^= 1
    (tmp_path / "held" / "state.json").write_text(json.dumps(state))
    second = held(tmp_path / "held")
    changed = [name for name in first if first[name] != second[name]]
    assert (len(changed), "random_state" in changed) == (2, True)


def test_evaluation_and_generation_leave_no_trace(place: Path, tmp_path: Path, tell: Tell) -> None:
    """Held-out losses and answers drawn at random between the steps: the training is bit for bit that without them."""
    samples = {"prompts": ["dog"], "every": 4, "max_tokens": 3, "temperature": 1.0}
    callbacks: dict[str, Callable[[], Sequence[Callback]]] = {
        "with": lambda: [Evaluation(every=3), SampleGenerator(file=tmp_path / "samples.jsonl", **samples)],
        "without": list,
    }
    found = {}
    for name, made in callbacks.items():
        fit(Run(mistral(), chats(), made), place, tmp_path / name, Halt(24, tmp_path / name / "held"))
        found[name] = held(tmp_path / name / "held")
        for told in ("metrics", "evaluation", "callbacks"):
            del found[name][told]
    assert len(read_json_lines(tmp_path / "samples.jsonl")) == 7
    assert found["with"] == found["without"]
    tell("Evaluation and sampling between the steps, on and off", "24 steps bit-identical")
