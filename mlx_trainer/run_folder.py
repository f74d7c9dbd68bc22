"""The folder of a run: its name, whether it can be used, and what it says of the run."""

import logging
import os
import re
from itertools import count
from pathlib import Path

from attrs import evolve

from mlx_trainer.callback import Callback
from mlx_trainer.callbacks import LambdaCallback
from mlx_trainer.checkpoint import CheckpointStore, verify
from mlx_trainer.config import Config, ConfigError, ModelConfig, to_yaml
from mlx_trainer.data import DataReport, show_examples
from mlx_trainer.models import CausalLMModule, ModelError
from mlx_trainer.models.hf_config import read_json
from mlx_trainer.module import TrainerModule
from mlx_trainer.monitoring import (
    MonitoringError,
    mask_secrets,
    stderr_console,
    write_atomic,
    write_environment,
    write_report,
)
from mlx_trainer.trainer import Trainer

log = logging.getLogger("mlx_trainer.run_folder")

SHOWN_CHARACTERS, KEPT_CHARACTERS = 1_000, 10_000
"""How much of each training row is shown before a training, and kept in its folder."""


def run_directory(config: Config) -> Path:
    """Return the folder that `config` names; else runs/ and the dataset's name, numbered where runs have it already."""
    if config.run.directory is not None:
        return Path(config.run.directory)
    name = run_name(config.data.train_paths[0])
    numbered = (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in count(1))
    taken, free = [], next(numbered)
    while free.exists():
        taken, free = [free], next(numbered)
    return taken[0] if taken and config.run.resume == "auto" else free


def run_name(path: str) -> str:
    """Return the name of a run on the data at `path`: that of the file, folder or dataset, as a folder can have it.

    >>> [run_name(path) for path in ("a/chats.jsonl.gz", "hf:owner/name:config", "logs/*.jsonl", "v1.5/")]
    ['chats', 'name-config', 'logs', 'v1.5']
    """
    for part in reversed(Path(path.removeprefix("hf:")).absolute().parts):
        name = part if Path(path).is_dir() else re.sub(r"(\.jsonl?)?(\.gz|\.zst)?$", "", part)
        if name := re.sub(r"[*?\[\]:/]+", "-", name).strip("-"):
            return name
    return "data"


def check_run_directory(run_dir: Path, resume: str | None) -> None:
    """Raise ConfigError where `run_dir` cannot be made or holds another run, CheckpointError for a bad checkpoint."""
    if resume is not None and resume != "auto":
        verify(Path(resume))
    if resume is None and any(run_dir.glob("checkpoints/step-*")):
        raise ConfigError(f"{run_dir}: holds an earlier run; continue it with --resume auto, or name another --output")
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise ConfigError(f"{run_dir}: cannot be made, because {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{run_dir}: cannot be made, because {existing} is not yours to write")


def goes_on(run_dir: Path, resume: str | None) -> bool:
    """Tell whether a training in `run_dir` takes its weights from a checkpoint; "auto" may find none."""
    return resume is not None and (resume != "auto" or bool(CheckpointStore(run_dir / "checkpoints").list()))


def as_begun(config: Config, run_dir: Path) -> Config:
    """Return `config` with the Hub's commit that the run began with, where it goes on and names no revision.

    A branch may have moved since, and the checkpoint would not fit its weights.
    """
    resume, model = config.run.resume, config.model
    if resume is None or model.revision is not None or is_local(model) or not goes_on(run_dir, resume):
        return config
    folder = run_dir if resume == "auto" else Path(resume).absolute().parents[1]
    try:
        begun = read_json(folder / "environment.json")["model"]
        name, commit = begun["name"], begun["revision"]
    except (ModelError, KeyError, TypeError):  # the checkpoint itself then tells of weights that it does not fit
        return config
    if name != model.model_name or commit is None:
        return config
    log.info("%s at commit %s, with which the run began", name, commit)
    return evolve(config, model=evolve(model, revision=commit))


def resolved_config(config: Config, run_dir: Path, module: CausalLMModule) -> Config:
    """Return `config` with what was found: the run's folder, and the Hub's commit of the base model.

    So `train <folder>/config.yaml --resume auto` continues this very run, and without --resume repeats it.
    """
    commit = None if is_local(config.model) else module.base_facts()["revision"]
    model = config.model if commit is None else evolve(config.model, revision=commit)
    return evolve(config, model=model, run=evolve(config.run, directory=str(run_dir)))


def is_local(model: ModelConfig) -> bool:
    """Tell whether a base is a folder here, which has no revisions, even where it lies in the Hub's cache."""
    return Path(model.model_name).expanduser().is_dir()


def description(config: Config, module: CausalLMModule, report: DataReport) -> Callback:
    """Return what writes `config` and the environment into the run folder once it is sure that steps will be taken.

    A resume that is refused, or has nothing left to do, leaves what the folder says of the run as it is.
    """

    def describe(trainer: Trainer, _: TrainerModule, epoch: int) -> None:
        if trainer.run_dir is not None and trainer.step_output is None:
            write_atomic(trainer.run_dir / "config.yaml", to_yaml(config))
            facts = {"model": module.base_facts(), "data": kept(report).as_dict()}
            write_environment(trainer.run_dir, seed=config.data.seed, **facts)

    return LambdaCallback("describing", on_epoch_start=describe)


def refuse_secrets(config: Config) -> None:
    """Raise ConfigError where `config`, which the run folder and each checkpoint keep, holds an access token."""
    lines = to_yaml(config).splitlines()
    if wrong := [line for line in lines if mask_secrets(line) != line]:
        raise ConfigError(
            f"the configuration holds an access token ({mask_secrets(wrong[0]).strip()}), and would be kept with the "
            "run; take it out, and give it in the environment, such as HF_TOKEN"
        )


def leave_report(run_dir: Path) -> None:
    """Write the run's report.html, however the run ended; that it cannot be written is told, and hides no error."""
    try:
        write_report(run_dir)
    except MonitoringError as error:
        log.warning("%s", error)


def tell(report: DataReport) -> None:
    """Log the figures that the pipeline has not, and show the first rows on stderr, where no log file gets them."""
    for line in report.epoch_lines():
        log.info("%s", line)
    show_examples([row.changed(mask_secrets).shortened(SHOWN_CHARACTERS) for row in report.examples], stderr_console())


def kept(report: DataReport) -> DataReport:
    """The report as it is written into the run folder: without access tokens, and with no row of unbounded length."""
    examples = tuple(row.changed(mask_secrets).shortened(KEPT_CHARACTERS) for row in report.examples)
    return evolve(report, examples=examples)
