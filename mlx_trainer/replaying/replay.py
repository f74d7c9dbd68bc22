"""A step of a run again: the loss of each of its rows and the norm of each layer's gradient, as they were.

A batch is a pure function of seed, epoch and position, and resuming is exact. So the run is taken up at the checkpoint
before the step, in nothing but its loop and the callbacks that have a say in updates, and comes to the same numbers,
bit for bit on the same machine and versions. It is how one finds the row behind a NaN or a spike.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from attrs import evolve

from mlx_trainer import build
from mlx_trainer.callback import Callback, overrides
from mlx_trainer.checkpoint import CheckpointStore, step_of, verify
from mlx_trainer.config import Config, ConfigError, load_config
from mlx_trainer.data import BatchLoader
from mlx_trainer.folders import same_files
from mlx_trainer.models import CausalLMModule
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring import MetricsTracker, setup_logging
from mlx_trainer.replaying.looking import batches_of, look
from mlx_trainer.replaying.step import ReplayedStep
from mlx_trainer.state import key_to_seed, random_key, restore_random_state
from mlx_trainer.step import StepOutput
from mlx_trainer.traced import copied, number
from mlx_trainer.trainer import Trainer, TrainingError


class Watch(Callback):
    """Keeps what stood before one step, and ends the run after it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.output: StepOutput | None = None
        self.logged: dict[int, float] = {}

    def on_step_start(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Keep epoch, position, parameters and randomness; references are enough."""
        if step == self.step:
            self.epoch, self.position = trainer.state.epoch, trainer.state.position
            self.parameters, self.key = copied(module.model.trainable_parameters()), random_key()

    def put_back(self, module: TrainerModule) -> None:
        """Let parameters and randomness be what they were before the step."""
        module.model.update(self.parameters)
        restore_random_state(key_to_seed(self.key))

    def on_step_end(self, trainer: Trainer, module: TrainerModule, step: int) -> None:
        """Keep the step's results, and stop."""
        if step == self.step:
            self.output = trainer.step_output
            trainer.request_stop("the step was taken again")

    def on_log(self, trainer: Trainer, module: TrainerModule, step: int, metrics: dict[str, float]) -> None:
        """Keep the loss."""
        self.logged[step] = metrics["train/loss"]


def replay(run_dir: str | Path, step: int) -> ReplayedStep:
    """Take step `step` of the run in `run_dir` again; nothing is written there.

    Raises ConfigError where there is no such run or step, CheckpointError or DataError where what it was made of is not
    what it was.
    """
    run_dir = Path(run_dir)
    config = config_of_run(run_dir)
    if step < 1:
        raise ConfigError(f"--step is {step}; the first step is 1")
    store = CheckpointStore(run_dir / "checkpoints")
    begin = store.before(step)
    with setup_logging(level="ERROR"):  # that the callbacks of the run are not all here needs no warning
        module = build.build_module(config)
        data = build.build_data(config, module)
        build.prepare(config, module, data, resumed=begin is not None)
        loader = data.train_loader()
        watch = Watch(step)
        output = taken_again(trainer_of(config, begin, watch), module, loader, watch)
        equal = saves_as(module, store.path(step)) if store.path(step).is_dir() else None
        begun_at = 0 if begin is None else step_of(begin)
        logged = compared(run_dir, watch.logged, begun_at, config.training.logging_steps)
        watch.put_back(module)
        accumulate = config.training.gradient_accumulation_steps
        rows, gradient_norms = look(module, batches_of(loader, watch.epoch, watch.position, accumulate))
        return ReplayedStep(
            step=step,
            epoch=watch.epoch,
            begun_at=begun_at,
            loss=number(output.total) / number(output.weight),
            accepted=all(bool(verdict.item()) for verdict in output.verdicts.values()),
            learning_rate=None if output.learning_rate is None else number(output.learning_rate),
            values={name: number(value) for name, value in output.values.items()},
            rows=rows,
            gradient_norms=gradient_norms,
            logged=logged,
            checkpoint_equal=equal,
        )


def config_of_run(run_dir: Path) -> Config:
    """The resolved configuration of a run; raises ConfigError where the folder has none."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir}: is not the folder of a run, which has its config.yaml")
    return load_config(path)


def trainer_of(config: Config, begin: Path | None, watch: Watch) -> Trainer:
    """The run's trainer from `begin` on, without what only looks on."""
    resume = None if begin is None else str(begin)
    config = evolve(config, run=evolve(config.run, resume=resume))
    deciding = [each for each in build.build_callbacks(config) if has_a_say(each)]
    return build.trainer_with(config, [*deciding, watch])


def has_a_say(callback: Callback) -> bool:
    """Whether the callback can change an update."""
    return overrides(callback, "transform_gradients") or overrides(callback, "accept_update")


def taken_again(trainer: Trainer, module: CausalLMModule, loader: BatchLoader, watch: Watch) -> StepOutput:
    """The results of the step."""
    try:
        steps = trainer.fit(module, loader).steps
    except TrainingError:
        if watch.output is None:
            raise
    if watch.output is None:
        raise ConfigError(f"--step is {watch.step}, but the run ends with step {steps}")
    return watch.output


def compared(run_dir: Path, losses: Mapping[int, float], begun_at: int, every: int) -> dict[int, bool]:
    """At which steps the run logged the loss of as many steps as were taken again, and whether it was the same."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    own = dict(zip(*MetricsTracker.read(path).series("train/loss"), strict=True))
    whole = [step for step in losses if step % every == 0 and step - begun_at >= every and step in own]
    return {step: own[step] == losses[step] or math.isnan(own[step] + losses[step]) for step in whole}


def saves_as(module: CausalLMModule, checkpoint: Path) -> bool:
    """Whether what `module` would save now is what the checkpoint has, byte for byte."""
    verify(checkpoint)
    with TemporaryDirectory() as folder:
        module.save(Path(folder))
        return same_files(Path(folder), checkpoint)
