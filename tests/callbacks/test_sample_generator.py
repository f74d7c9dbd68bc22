import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlx_trainer.callbacks import (
    Evaluation,
    LambdaCallback,
    MetricsLogger,
    ModelCheckpoint,
    SampleGenerator,
    TensorBoardLogger,
)
from mlx_trainer.callbacks.sample_text import as_lines, as_markdown
from mlx_trainer.evaluation import GeneratedSample
from mlx_trainer.module import TrainerModule
from mlx_trainer.trainer import Trainer, TrainingError
from tests.callbacks.toy import Regression, Snapshots, batches, fit

VALIDATION = batches(2, seed=1)
PROMPTS = ["Who are you?", "What is 2 + 2?"]


def records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered_steps(generator: SampleGenerator, directory: Path, *more: Any, **options: Any) -> list[int]:
    """Train with the generator and return the steps that its file has answers of."""
    fit([generator, *more], run_dir=directory, **options)
    return [record["step"] for record in records(directory / "samples.jsonl")]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 4, 6]),
        ({"at_start": False}, [4, 6]),
        ({"every": 3}, [0, 3, 6]),
        ({"every": 5}, [0, 5, 6]),
    ],
)
def test_when_it_answers(tmp_path: Path, options: dict[str, Any], steps: list[int]) -> None:
    """At each evaluation or every N steps, at the start unless told otherwise, and at the end; once per step."""
    generator = SampleGenerator(["Hello"], **options)
    assert answered_steps(generator, tmp_path, Evaluation(every=4, at_start=True), validation=VALIDATION) == steps


def test_without_any_evaluation_start_and_end_are_compared(tmp_path: Path) -> None:
    """The answers before the first step and after the last are always there."""
    assert answered_steps(SampleGenerator(["Hello"]), tmp_path) == [0, 6]


def test_training_is_the_same_with_it_as_without() -> None:
    """With dropout, parameters and optimizer state are bit-identical at each step, and the mode is restored."""
    seen = [Snapshots(), Snapshots()]
    trainer, _ = fit([seen[0], SampleGenerator(PROMPTS, every=1, temperature=1.0)])
    fit([seen[1]])
    assert seen[0].after == seen[1].after
    assert trainer.module.model.training


def test_its_time_is_not_the_steps() -> None:
    """Generation in the middle of an interval is left out of perf/step_ms."""
    import time

    class Slow(Regression):
        def generate(self, prompts: Any, **options: Any) -> list[str]:
            """Take a third of a second."""
            time.sleep(0.3)
            return ["…"]

    trainer = Trainer(callbacks=[SampleGenerator(["Hello"], every=1)], max_steps=2, log_every=2)
    started = time.perf_counter()
    result = trainer.fit(Slow(), batches())
    assert time.perf_counter() - started > 0.9
    assert result.metrics["perf/step_ms"] < 1000 * (time.perf_counter() - started - 0.6) / 2


def test_options_reach_the_module(tmp_path: Path) -> None:
    """max_tokens, temperature and timeout_s are handed to generate; the file holds prompts, answers and references."""
    generator = SampleGenerator(
        PROMPTS, references=["A model.", None], max_tokens=5, temperature=0.5, timeout_s=2.0, at_start=False
    )
    fit([generator], run_dir=tmp_path)
    expected = [
        {"step": 6, "prompt": PROMPTS[0], "generated_text": "Who are you? 5 0.5 2.0", "reference": "A model."},
        {"step": 6, "prompt": PROMPTS[1], "generated_text": "What is 2 + 2? 5 0.5 2.0", "reference": None},
    ]
    assert records(tmp_path / "samples.jsonl") == expected


def test_a_file_of_its_own(tmp_path: Path) -> None:
    """`file` is used as it is, its folder made."""
    fit([SampleGenerator(["Hello"], file=tmp_path / "deep" / "said.jsonl")])
    assert [record["step"] for record in records(tmp_path / "deep" / "said.jsonl")] == [0, 6]


def test_the_console_shows_each_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run folder the answers still go to stderr."""
    fit([SampleGenerator([PROMPTS[1]], at_start=False, max_tokens=7)])
    assert capsys.readouterr().err == "step 6  answers\n  > What is 2 + 2?\n    What is 2 + 2? 7 0.0 30.0\n"


def begins_right(samples: list[GeneratedSample]) -> float:
    """Return the share of answers that begin with their reference."""
    return sum(sample.generated_text.startswith(str(sample.reference)) for sample in samples) / len(samples)


def test_metrics_of_the_answers_join_the_evaluation(tmp_path: Path) -> None:
    """At an evaluation they are val/ metrics like others, so that a checkpoint can be chosen by them."""
    generator = SampleGenerator(PROMPTS, references=["Who", "Nobody"], metrics={"match": begins_right})
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/match", mode="max")
    _, result = fit(
        [checkpoint, MetricsLogger(), generator, Evaluation(every=3)], validation=VALIDATION, run_dir=tmp_path
    )
    assert result.evaluation.as_dict()["val/match"] == 0.5
    logged = [(line["step"], line["val/match"]) for line in records(tmp_path / "metrics.jsonl") if "val/match" in line]
    assert logged == [(3, 0.5), (6, 0.5)]
    assert checkpoint.best is not None
    assert (checkpoint.best.step, checkpoint.best.value) == (3, 0.5)


def test_metrics_between_evaluations_join_the_log(tmp_path: Path) -> None:
    """With every=N they are in the log of that step."""
    generator = SampleGenerator(PROMPTS, every=4, references=["Who", "What"], metrics={"match": begins_right})
    fit([MetricsLogger(), generator], run_dir=tmp_path)
    assert [line.get("val/match") for line in records(tmp_path / "metrics.jsonl")] == [None, 1.0, None]


def test_tensorboard_has_the_texts(tmp_path: Path) -> None:
    """One tag per prompt, the x axis being the step; messages show their last one."""
    prompts = ["Hello", [{"role": "user", "content": "Bye"}]]
    fit([SampleGenerator(prompts), TensorBoardLogger()], run_dir=tmp_path)
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [event.step for event in reader.Tensors("samples/1/text_summary")] == [0, 6]
    text = reader.Tensors("samples/2/text_summary")[1].tensor_proto.string_val[0].decode()
    assert text == "**prompt**\n\n    Bye\n\n**answer**\n\n    [{'role': 'user', 'c 128 0.0 30.0"


def test_a_resumed_run_has_each_answer_once(tmp_path: Path) -> None:
    """Answers after the checkpoint are dropped and given again; the untrained model is not asked a second time."""
    for max_epochs in (1, 2):
        callbacks = [SampleGenerator(["Hello"], every=3), ModelCheckpoint(every=4, save_at_end=False)]
        fit(callbacks, run_dir=tmp_path, max_epochs=max_epochs, resume="auto")
    assert [record["step"] for record in records(tmp_path / "samples.jsonl")] == [0, 3, 6, 9, 12]


def test_resuming_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    """Where no step is left, the answers of the last one stand already."""
    for _ in range(2):
        fit([SampleGenerator(["Hello"]), ModelCheckpoint()], run_dir=tmp_path, resume="auto")
    assert [record["step"] for record in records(tmp_path / "samples.jsonl")] == [0, 6]


def test_answers_at_the_end_that_a_kill_cut_off_are_given_by_the_next_run(tmp_path: Path) -> None:
    """Between the last checkpoint and the end there are only they: the finished run is resumed for them."""
    for _ in range(2):
        fit([SampleGenerator(["Hello"]), ModelCheckpoint()], run_dir=tmp_path, resume="auto")
        path = tmp_path / "samples.jsonl"
        whole = path.read_text()
        path.write_text(whole.splitlines(keepends=True)[0])
    fit([SampleGenerator(["Hello"]), ModelCheckpoint()], run_dir=tmp_path, resume="auto")
    assert path.read_text() == whole


def test_validate_alone_asks_nothing(tmp_path: Path) -> None:
    """trainer.validate measures; answers belong to training."""
    module = Regression()
    Trainer(callbacks=[SampleGenerator(["Hello"])], run_dir=tmp_path / "run").validate(module, VALIDATION)
    assert (module.answers, list(tmp_path.iterdir())) == ([], [])


def test_a_module_that_cannot_write_is_refused() -> None:
    """Before anything is loaded, by name."""

    class Mute(TrainerModule):
        """A module without generate."""

    with pytest.raises(TrainingError, match=r"needs a module with generate\(prompts, …\); Mute has none"):
        Trainer(callbacks=[SampleGenerator(["Hello"])]).fit(Mute(), batches())


def test_wrong_arguments_are_named() -> None:
    """As many references as prompts, and a step number above 0."""
    with pytest.raises(ValueError, match="1 references for 2 prompts"):
        SampleGenerator(PROMPTS, references=["A model."])
    with pytest.raises(ValueError, match="SampleGenerator: every is 0"):
        SampleGenerator(PROMPTS, every=0)


def test_texts_for_people() -> None:
    """Line breaks are visible on the console and literal in Markdown."""
    sample = GeneratedSample("Say\nit", " It\nis. ", "It.")
    assert as_lines(3, [sample], {"match": 1 / 3}) == "step 3  answers  match 0.3333\n  > Say⏎it\n    It⏎is."
    assert as_markdown(sample) == (
        "**prompt**\n\n    Say\n    it\n\n**answer**\n\n     It\n    is. \n\n**reference**\n\n    It."
    )


def test_other_loggers_with_log_text_are_found() -> None:
    """Whatever callback has a log_text gets the texts."""

    class Notebook(LambdaCallback):
        def __init__(self) -> None:
            super().__init__("notebook")
            self.told: list[tuple[str, int]] = []

        def log_text(self, tag: str, text: str, step: int) -> None:
            """Keep it."""
            self.told.append((tag, step))

    notebook = Notebook()
    fit([SampleGenerator(PROMPTS), notebook])
    assert notebook.told == [("samples/1", 0), ("samples/2", 0), ("samples/1", 6), ("samples/2", 6)]
