"""Checkpoints written while the training goes on: what they hold, when they are told, and how they fail."""

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attrs import evolve

from mlx_trainer import (
    Callback,
    LambdaCallback,
    LoRAConfig,
    MistralLoRAModule,
    ModelCheckpoint,
    Trainer,
    TrainerModule,
)
from mlx_trainer.checkpoint import CheckpointError, CheckpointStore, verify
from mlx_trainer.checkpoint import store as checkpoint
from mlx_trainer.snapshot import own_containers
from tests.models.batches import labelled
from tests.tiny import tiny_mistral
from tests.toy import ToyLoader, ToyModule, toy_batches

LOOP = threading.get_ident()
MANY = toy_batches((4, 3, 2, 4, 1) * 8)


def fit(folder: Path, *callbacks: Callback, every: int = 1, **options: Any) -> Trainer:
    """Train with a checkpoint at each `every` steps, all of which stay."""
    saving = ModelCheckpoint(folder, every=every, keep_last=None, background=options.pop("background", True))
    trainer = Trainer(callbacks=[*callbacks, saving], **options)
    trainer.fit(ToyModule(), ToyLoader(MANY))
    return trainer


def contents(folder: Path) -> dict[str, Any]:
    """All that the checkpoints hold, by name; the bytes of each tensor, and no times."""
    held: dict[str, Any] = {}
    for path in CheckpointStore(folder / "checkpoints").list():
        verify(path)
        for file in path.glob("*.safetensors"):
            tensors = mx.load(str(file))
            assert isinstance(tensors, dict)
            held |= {f"{path.name}/{file.name}/{name}": np.array(value).tobytes() for name, value in tensors.items()}
        held[path.name] = json.loads((path / "state.json").read_text()) | {"seconds": None, "metrics": None}
    return held


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before the event is set."""
    event, write_directory = threading.Event(), checkpoint.write_directory

    def late(final: Path, write: Callable[[Path], None]) -> None:
        assert event.wait(30)
        write_directory(final, write)

    monkeypatch.setattr(checkpoint, "write_directory", late)
    yield event
    event.set()  # the thread serves the tests that follow


@pytest.mark.parametrize("cuda", [False, True], ids=["shared memory", "as on CUDA"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_late_write_holds_the_step_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int, cuda: bool
) -> None:
    """Written at any moment of later steps, it is bit for bit what is written at once; dropout, AdamW, callbacks."""
    options: dict[str, Any] = {"every": 20, "accumulate": accumulate, "max_epochs": 8}
    fit(tmp_path / "now", background=False, **options)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: cuda)  # then arrays are copied, on whatever device there is
    rng, write_directory = random.Random(3), checkpoint.write_directory

    def late(final: Path, write: Callable[[Path], None]) -> None:
        time.sleep(rng.uniform(0, 0.01))  # twenty steps to the next checkpoint take longer
        write_directory(final, write)

    monkeypatch.setattr(checkpoint, "write_directory", late)
    fit(tmp_path / "late", **options)

    expected = contents(tmp_path / "now")
    assert sum("/" not in name for name in expected) == 16 // accumulate
    assert contents(tmp_path / "late") == expected


@pytest.mark.parametrize("odd", [False, True])
def test_a_language_model_is_saved_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: bool
) -> None:
    """Its model is a property, its file an adapter in mlx-lm's layout; while it trains, the same is written."""
    tiny_mistral(tmp_path / "base")
    threads, seal = set(), checkpoint.seal

    def noted(directory: Path, run: str | None) -> None:
        threads.add(threading.current_thread().name)
        seal(directory, run)

    monkeypatch.setattr(checkpoint, "seal", noted)
    for name, background in (("late", True), ("now", False)):
        lora = LoRAConfig(rank=2, alpha=4, dropout=0.1)
        if odd:  # what is written is computed from the parameters
            lora = evolve(lora, init_lora_weights="pissa", use_rslora=True, rank_pattern={"v_proj": 3})
        module = MistralLoRAModule(tmp_path / "base", lora=lora, dtype="float32", schedule="constant", warmup_steps=0)
        saving = ModelCheckpoint(tmp_path / name, every=2, keep_last=None, background=background)
        Trainer(callbacks=[saving]).fit(module, [labelled(seed=seed) for seed in range(7)])

    held = contents(tmp_path / "late")
    assert held == contents(tmp_path / "now")
    changing = {value for name, value in held.items() if name.endswith("/model.layers.0.self_attn.q_proj.lora_b")}
    assert len(changing) == 4  # steps 2, 4, 6 and 7
    assert threads == {"checkpoint-writer", threading.current_thread().name}


def test_a_snapshot_has_containers_of_its_own() -> None:
    """Modules, lists and dicts are new, every array is the same one; what training puts into the old is not seen."""
    module = ToyModule()
    module.setup("fit")
    copied = own_containers(module.model)
    before = copied.layers[0].weight
    assert before is module.model.layers[0].weight
    module.model.layers[0].weight = mx.zeros((8, 6))
    assert copied.layers[0].weight is before
    assert type(copied.layers[1]) is type(module.model.layers[1])


def test_the_next_step_is_dispatched_before_the_saved_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a checkpoint the loop only takes references: between two dispatches it waits for nothing and reads nothing."""
    order: list[str] = []

    def told(owner: Any, name: str, text: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == LOOP:
                order.append(text)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    told(mx, "eval", "wait")
    told(mx.array, "tolist", "read")
    note = LambdaCallback(
        on_step_dispatched=lambda trainer, module, step: order.append(f"dispatched {step}"),
        on_checkpoint=lambda trainer, module, step: order.append(f"checkpoint {step}"),
    )
    fit(tmp_path, note, every=2, max_steps=4, log_every=100)

    begun = order.index("dispatched 2")
    # the wait of step 2 is for step 1; those of step 3 are for step 2 and for the arrays that are handed over
    expected = ["dispatched 2", "wait", "checkpoint 2", "dispatched 3", "wait", "wait", "dispatched 4"]
    assert order[begun : begun + 7] == expected


def test_a_checkpoint_is_told_by_the_loop_once_it_is_complete(tmp_path: Path, delayed: threading.Event) -> None:
    """At the end of the step in which it is done, before the next one, and the last before the fit ends."""
    order: list[str] = []

    class Note(Callback):
        def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
            order.append(f"step {step}")
            if step == 5:
                delayed.set()
                time.sleep(0.5)

        def on_checkpoint_saved(self, trainer: Trainer, module: TrainerModule, path: Path) -> None:
            verify(path)
            assert threading.get_ident() == LOOP
            order.append(path.name)

        def on_fit_end(self, trainer: Trainer, module: TrainerModule) -> None:
            order.append("end")

    fit(tmp_path, Note(), every=3, max_steps=6)

    steps = [f"step {step}" for step in range(1, 6)]
    assert order == [*steps, "step-00000003", "step 6", "step-00000006", "end"]


def test_one_is_written_at_a_time_and_the_stall_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that falls due while another is written waits for it; the next log says how long, and only once."""
    under_way, seal = [0], checkpoint.seal

    def slow(directory: Path, run: str | None) -> None:
        under_way[0] += 1
        assert under_way == [1]
        time.sleep(0.1)
        under_way[0] -= 1
        seal(directory, run)

    monkeypatch.setattr(checkpoint, "seal", slow)
    stalls: dict[int, float | None] = {}

    class Note(Callback):
        def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
            stalls[step] = metrics.get("perf/checkpoint_stall_us")

    fit(tmp_path, Note(), every=4, max_steps=11, log_every=1)

    first, second = stalls.pop(5), stalls.pop(9)
    assert first is not None and second is not None  # noqa: PT018 - for the type checker
    assert 0 < first < 50_000 < second < 1_000_000
    assert set(stalls.values()) == {None}


def full_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The disk is full when the checkpoint of `step` is written."""
    seal = checkpoint.seal

    def fails(directory: Path, run: str | None) -> None:
        if directory.name.endswith(f"{step:08d}"):
            raise OSError(28, "No space left on device")
        seal(directory, run)

    monkeypatch.setattr(checkpoint, "seal", fails)


@pytest.mark.parametrize("steps", [8, 4], ids=["while training", "at the end"])
def test_a_full_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """With the CheckpointError of the loop, before another checkpoint is begun; what is older stays, no result."""
    full_disk(monkeypatch, 4)
    with pytest.raises(CheckpointError, match=r"could not write .*step-00000004: .*No space left on device"):
        fit(tmp_path, LambdaCallback(on_step_end=lambda *_: time.sleep(0.02)), every=2, max_steps=steps)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {".run", "step-00000002"} <= names
    assert len(names) == (2 if steps == 4 else 3)  # the third: the step at whose end the error came
    assert "step-00000004" not in names
    assert not (tmp_path / "model").exists()


def raising(error: BaseException, at: int) -> Callback:
    """Raise `error` at the end of step `at`."""

    def fails(trainer: Trainer, module: TrainerModule, step: int) -> None:
        if step == at:
            raise error

    return LambdaCallback("raising", on_step_end=fails)


def test_an_error_in_training_waits_for_the_write(tmp_path: Path, delayed: threading.Event) -> None:
    """The checkpoint under way is completed and told before the error is raised."""
    told: list[str] = []
    note = LambdaCallback(
        on_checkpoint_saved=lambda trainer, module, path: told.append(path.name),
        on_exception=lambda trainer, module, error: told.append(str(error)),
    )
    threading.Timer(0.3, delayed.set).start()
    with pytest.raises(RuntimeError, match="original"):
        fit(tmp_path, note, raising(RuntimeError("original"), at=4), every=3, max_steps=9)
    assert told == ["step-00000003", "original"]
    verify(tmp_path / "checkpoints" / "step-00000003")


def test_an_error_in_training_is_not_hidden_by_one_of_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two, that of the training is raised, and the other logged."""
    full_disk(monkeypatch, 3)
    with pytest.raises(RuntimeError, match="original"):
        fit(tmp_path, raising(RuntimeError("original"), at=4), every=3, max_steps=9)
    assert "a checkpoint could not be finished" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_second_interrupt_waits_for_nothing(tmp_path: Path, delayed: threading.Event) -> None:
    """KeyboardInterrupt is raised while the write is still held up."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, raising(KeyboardInterrupt(), at=5), every=3, max_steps=9)
    assert not delayed.is_set()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [".run"]


def test_a_module_with_a_save_of_its_own_is_saved_in_the_loop(tmp_path: Path) -> None:
    """What it reads beside the parameters is not known, so nothing runs meanwhile."""
    threads: list[int] = []

    class Own(ToyModule):
        def save(self, directory: Path) -> None:
            threads.append(threading.get_ident())
            super().save(directory)

    Trainer(callbacks=[ModelCheckpoint(tmp_path, every=3)], max_steps=4).fit(Own(), MANY)
    assert threads == [LOOP] * 3  # steps 3 and 4, and the result
