"""Our trainer and mlx-lm's in turns, each turn a process of its own, so that memory and caches do not mix."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cattrs
from attrs import asdict, evolve, frozen

from mlx_trainer import _blas, runtime
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.measuring import Report
from mlx_trainer.benchmarking.peer_clock import PeerReport
from mlx_trainer.config import Config, ConfigError, to_yaml
from mlx_trainer.monitoring import environment_facts, stderr_console
from mlx_trainer.trainer import TrainingError

COMPARED = ("tokens_per_s", "step_ms", "peak_gb", "first_epoch_s")
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon", "sgd": "SGD", "adafactor": "Adafactor"}
"""Those that `mlx_lm.lora` offers, and their names in `mlx.optimizers`."""
PACKAGES = Path(__file__).parents[2]


@frozen
class Turn:
    """What is compared: of the turn that counts all but `cold_first_step_s`, which is of the turn before it.

    Both times of a first step are since the process began, `first_epoch_s` since the training did. Without the
    largest batch (`longest_seen`) the peak of memory is a lower one than that of an epoch.
    """

    tokens_per_s: float
    step_ms: float
    peak_gb: float
    longest_seen: bool
    first_epoch_s: float
    epoch_estimated: bool
    first_step_s: float
    cold_first_step_s: float


@frozen
class Comparison:
    """Our report, and the turns by name, ours first."""

    ours: Report
    turns: Mapping[str, Turn]

    def ratios(self, name: str) -> dict[str, float]:
        """Ours through `name`'s, for each figure in `COMPARED`; none for peaks without the largest batch."""
        ours, theirs = self.turns[OURS.name], self.turns[name]
        figures = [figure for figure in COMPARED if figure != "peak_gb" or (ours.longest_seen and theirs.longest_seen)]
        return {figure: getattr(ours, figure) / getattr(theirs, figure) for figure in figures}

    def as_dict(self) -> dict[str, Any]:
        """Our figures and, under `comparison`, the turns and ratios, as JSON values."""
        peers = [name for name in self.turns if name != OURS.name]
        turns = {name: asdict(turn) for name, turn in self.turns.items()}
        return self.ours.as_dict() | {"comparison": {"turns": turns, "ratios": {n: self.ratios(n) for n in peers}}}


@frozen
class Runner:
    """Who takes turns: the module that is run, what it prints, variables of its environment, and a warm-up of its own.

    `settings` says whether the environment has the variables that we set for MLX.
    """

    name: str
    command: tuple[str, ...]
    report: type[Report] | type[PeerReport]
    settings: bool = False
    variables: Mapping[str, str] = {}
    warmup: int | None = None

    def take_turn(self, path: str, extent: Extent) -> Report | PeerReport:
        """Run one turn with the configuration at `path` and return its report."""
        if self.warmup is not None and extent.warmup is None:
            extent = evolve(extent, warmup=self.warmup)
        told = (("--steps", extent.steps), ("--warmup", extent.warmup))
        options = [word for option, value in told if value is not None for word in (option, str(value))]
        output = output_of([sys.executable, "-m", *self.command, path, *options], self.environment())
        report: Report | PeerReport = cattrs.structure(json.loads(output), self.report)
        return report

    def environment(self) -> dict[str, str]:
        """The environment of its processes, in which this very package is found."""
        inherited = dict(os.environ) if self.settings else runtime.foreign_environment()
        paths = [str(PACKAGES), *filter(None, [inherited.get("PYTHONPATH")])]
        return {**inherited, "PYTHONPATH": os.pathsep.join(paths), **self.variables}


OURS = Runner("mlx_trainer", ("mlx_trainer", "benchmark", "--json"), Report, settings=True)
PEER = Runner("mlx_lm", ("mlx_trainer.benchmarking.peer",), PeerReport)


def runners() -> list[Runner]:
    """Who takes turns on this machine, in their order.

    Where we replace MLX's BLAS, mlx-lm runs with ours too. As installed it needs seconds for a step there, beside
    which compiling is nothing, so that one step is warm-up enough.
    """
    wanted = os.environ.get(_blas.VARIABLE, "").lower() not in _blas.OFF
    if not (wanted and sys.platform == "linux" and runtime.backend() == "cpu"):
        return [OURS, PEER]
    return [OURS, evolve(PEER, name="mlx_lm_same_blas"), evolve(PEER, variables={_blas.VARIABLE: "off"}, warmup=1)]


def compare(config: Config, extent: Extent) -> Comparison:
    """Let all of `runners` take a cold turn, then all a turn that counts.

    Raises ConfigError for what mlx-lm cannot do, and ConfigError or TrainingError with the words of a turn that failed.
    """
    if config.training.optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"--peer: mlx_lm.lora has no optimizer {config.training.optimizer}; "
            f"training.optimizer can be {', '.join(OPTIMIZERS)}"
        )
    reports: dict[str, list[Report | PeerReport]] = {}
    taking = runners()
    names = ", ".join(runner.name for runner in taking)
    tell(f"two turns each, {names}; the second ones count: {extent}")
    with TemporaryDirectory(prefix="mlx-trainer-benchmark-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8")
        for word, length in (("cold", evolve(extent, steps=1)), ("counts", extent)):
            for runner in taking:
                begun = time.perf_counter()
                report = runner.take_turn(str(path), length)
                reports.setdefault(runner.name, []).append(report)
                tokens, spent = report.speed.tokens_per_s, time.perf_counter() - begun
                tell(f"{runner.name}, {word}: {tokens:,.0f} real tokens/s; the turn took {spent:.0f} s")
    ours = reports[OURS.name][-1]
    assert isinstance(ours, Report)
    told = evolve(ours, environment=environment_facts())  # with the command that the user gave
    return Comparison(told, {name: turn_of(cold, counted) for name, (cold, counted) in reports.items()})


def turn_of(cold: Report | PeerReport, counted: Report | PeerReport) -> Turn:
    """What is compared of two turns."""
    return Turn(
        tokens_per_s=counted.speed.tokens_per_s,
        step_ms=counted.step_ms.mean,
        peak_gb=counted.peak_gb if isinstance(counted, PeerReport) else counted.memory.peak_gb,
        longest_seen=counted.longest_seen if isinstance(counted, PeerReport) else counted.shapes.all_seen,
        first_epoch_s=counted.epoch.first_s,
        epoch_estimated=counted.epoch.estimated,
        first_step_s=first_step(counted),
        cold_first_step_s=first_step(cold),
    )


def first_step(report: Report | PeerReport) -> float:
    """Seconds from the process's start until the first step was computed."""
    return report.first_step_s if isinstance(report, PeerReport) else report.start.from_process_s


def output_of(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run a command and return what it prints; raises what its exit code means, with what it said."""
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    _, _, said = done.stderr.rpartition("mlx-trainer: ")
    kinds = {1: TrainingError, 2: ConfigError}
    if said and "Traceback" not in done.stderr and done.returncode in kinds:
        raise kinds[done.returncode](said.strip())
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def tell(text: str) -> None:
    """Print a line on stderr while there is nothing else to see."""
    stderr_console().print(text, soft_wrap=True, markup=False, highlight=False)
