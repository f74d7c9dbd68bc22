"""Answers to fixed prompts, so that one sees a model learn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from attrs import asdict

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks.console import say
from mlx_trainer.callbacks.places import lines_up_to, place, writable_folder
from mlx_trainer.callbacks.sample_text import as_lines, as_markdown
from mlx_trainer.callbacks.timing import check_every
from mlx_trainer.evaluation import EvalMetrics, GeneratedSample, TextGenerator, generate_samples
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring.files import JsonLines
from mlx_trainer.trainer import Trainer, TrainingError

SampleMetric = Callable[[list[GeneratedSample]], float]
"""A number that says how good the answers are, such as the share that equals its reference."""


@runtime_checkable
class TextLogger(Protocol):
    """A callback that takes texts, such as TensorBoardLogger."""

    def log_text(self, tag: str, text: str, step: int) -> None:
        """Keep one text."""


class SampleGenerator(Callback):
    """Lets the model answer `prompts` every `every` steps (None: at each evaluation), at the start and at the end.

    The answers go to the console, to `file` (else `samples.jsonl` in the run folder, if there is one; a line per prompt
    with `step`, `prompt`, `generated_text`, `reference`) and to every logger with a `log_text`. `references` are what
    the data says. `max_tokens`, `temperature` and `timeout_s` (seconds an answer may take) go to `module.generate`.
    Each of `metrics`, a function of the list of samples, is reported as `val/<name>`. `at_start=False` leaves out the
    answers of the untrained model. The training goes on bit for bit as without it. Raises ValueError for a wrong number
    of references, TrainingError for a module that has no `generate`.

    Costs nothing between its turns; at one, the device waits for the step and generates: seconds on a large model.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        every: int | None = None,
        references: Sequence[str | None] | None = None,
        max_tokens: int = 128,
        temperature: float = 0.0,
        timeout_s: float | None = 30.0,
        at_start: bool = True,
        file: str | Path | None = None,
        metrics: Mapping[str, SampleMetric] | None = None,
    ) -> None:
        self.prompts, self.references = list(prompts), list(references or [None] * len(prompts))
        if len(self.references) != len(self.prompts):
            raise ValueError(f"SampleGenerator: {len(self.references)} references for {len(self.prompts)} prompts")
        self.every, self.at_start, self.file = check_every(every, "SampleGenerator"), at_start, file
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "timeout_s": timeout_s}
        self.metrics = dict(metrics or {})
        self.samples: list[GeneratedSample] = []
        """The newest answers."""
        self._scores: dict[str, float] = {}
        self._answered_step: int | None = None
        self._lines: JsonLines | None = None

    def setup(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Refuse a module that cannot write, and a folder that cannot be written, before anything is loaded."""
        if not callable(getattr(module, "generate", None)):
            raise TrainingError(
                f"SampleGenerator needs a module with generate(prompts, …); {type(module).__name__} has none"
            )
        self._fitting, self._answered_step, self._scores = stage == "fit", None, {}
        if self._fitting and (path := self._path(trainer)) is not None:
            writable_folder(path.parent)

    def on_fit_start(self, trainer: Trainer, module: TrainerModule) -> None:
        """Open the file at the step where the run begins."""
        self._answered_step = trainer.state.step or None  # a resumed step had its turn
        if (path := self._path(trainer)) is not None:  # unless it was the last one, and the end was cut off
            self._lines, answered = lines_up_to(path, trainer.state.step)
            self._answered_step = answered or None

    def on_epoch_start(self, trainer: Trainer, module: TrainerModule, epoch: int) -> None:
        """The untrained model's answers; by now every logger is open."""
        if self.at_start and trainer.state.step == 0:
            self._answer(trainer, module, 0)
            self._scores = {}  # a step of its own: the next log is of another

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Answer, at each step that `every` names."""
        if self.every is not None:
            with trainer.paused():
                self._answer(trainer, module, step)

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Report how good the answers since the last log were."""
        metrics.update({f"val/{name}": score for name, score in self._scores.items()})
        self._scores = {}

    def on_evaluation_end(self, trainer: Trainer, module: TrainerModule, step: int, metrics: EvalMetrics) -> None:
        """Answer, and report among the evaluation's own metrics."""
        if self.every is None and self._fitting and (self.at_start or step > 0):
            self._answer(trainer, module, step)
        metrics.metrics.update(self._scores)
        self._scores = {}

    def on_fit_end(self, trainer: Trainer, module: TrainerModule) -> None:
        """The trained model's answers."""
        self._answer(trainer, module, trainer.state.step)

    def teardown(self, trainer: Trainer, module: TrainerModule, stage: str) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _answer(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        if self._answered_step == step:
            return
        self._answered_step = step
        self.samples = generate_samples(cast(TextGenerator, module), self.prompts, self.references, **self.options)
        self._scores = {name: metric(self.samples) for name, metric in self.metrics.items()}
        say(as_lines(step, self.samples, self._scores))
        text_loggers = [callback for callback in trainer.events.callbacks if isinstance(callback, TextLogger)]
        for number, sample in enumerate(self.samples, 1):
            if self._lines is not None:
                self._lines.write({"step": step, **asdict(sample)})
            for text_logger in text_loggers:
                text_logger.log_text(f"samples/{number}", as_markdown(sample), step)

    def _path(self, trainer: Trainer) -> Path | None:
        if self.file is None and trainer.run_dir is None:
            return None
        return place(self.file, trainer, "samples.jsonl", "SampleGenerator")
