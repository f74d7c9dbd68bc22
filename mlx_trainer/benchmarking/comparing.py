"""Our trainer and mlx-lm's on the same rows, in turns."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import asdict, evolve, frozen

from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.measuring import Report
from mlx_trainer.benchmarking.peer_clock import PeerReport
from mlx_trainer.benchmarking.turns import OURS, Runner, runners
from mlx_trainer.config import Config, ConfigError, to_yaml
from mlx_trainer.monitoring import environment_facts, stderr_console

COMPARED = ("tokens_per_s", "step_ms", "peak_gb", "first_epoch_s")
OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "muon": "Muon", "sgd": "SGD", "adafactor": "Adafactor"}
"""Those that `mlx_lm.lora` offers, and their names in `mlx.optimizers`."""


@frozen
class Turn:
    """What is compared: the turn of median speed among those that count, but for `cold_first_step_s`, of the first.

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


def compare(config: Config, extent: Extent, rounds: int = 1) -> Comparison:
    """Let all of `runners` take a cold turn, then `rounds` turns that count.

    Raises ConfigError for what mlx-lm cannot do, and ConfigError or TrainingError with the words of a turn that failed.
    """
    check(config, rounds)
    load, taking = os.getloadavg()[0], runners()
    names = ", ".join(runner.name for runner in taking)
    tell(f"a cold turn each for {names}, then {rounds} that count{'s' * (rounds == 1)}: {extent}")
    with TemporaryDirectory(prefix="mlx-trainer-benchmark-") as folder:
        path = Path(folder, "config.yaml")
        path.write_text(to_yaml(config), encoding="utf-8")
        cold = take_turns(taking, path, evolve(extent, steps=1), "cold")
        counted = [take_turns(taking, path, extent, f"turn {number}") for number in range(1, rounds + 1)]
    chosen = [median([reports[i] for reports in counted]) for i in range(len(taking))]
    ours = chosen[0]
    assert isinstance(ours, Report)
    told = evolve(ours, environment=environment_facts(), load_before=load)  # with the command that the user gave
    turns = {runner.name: turn_of(*pair) for runner, *pair in zip(taking, cold, chosen, strict=True)}
    return Comparison(told, turns)


def check(config: Config, rounds: int) -> None:
    """Raise ConfigError for what `mlx_lm.lora` does not offer, and for no rounds at all."""
    if rounds < 1:
        raise ConfigError(f"--rounds is {rounds}; it must be a whole number, at least 1")
    if config.training.on_preferences:
        raise ConfigError(
            f"--peer: mlx_lm trains on no preferences; training.method {config.training.method} can be lora or full"
        )
    if config.training.optimizer not in OPTIMIZERS:
        raise ConfigError(
            f"--peer: mlx_lm.lora has no optimizer {config.training.optimizer}; "
            f"training.optimizer can be {', '.join(OPTIMIZERS)}"
        )


def take_turns(taking: Sequence[Runner], path: Path, extent: Extent, word: str) -> list[Report | PeerReport]:
    """Let each take one turn, and say how it went."""
    reports = []
    for runner in taking:
        begun = time.perf_counter()
        reports.append(runner.take_turn(str(path), extent))
        tokens, spent = reports[-1].speed.tokens_per_s, time.perf_counter() - begun
        tell(f"{word}, {runner.name}: {tokens:,.0f} real tokens/s, over after {spent:.0f} s")
    return reports


def median(reports: Sequence[Report | PeerReport]) -> Report | PeerReport:
    """The report of median speed, of an even number the slower one."""
    return sorted(reports, key=lambda report: report.speed.tokens_per_s)[(len(reports) - 1) // 2]


def turn_of(cold: Report | PeerReport, counted: Report | PeerReport) -> Turn:
    """What is compared of a cold turn and one that counts."""
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


def tell(text: str) -> None:
    """Print a line on stderr while there is nothing else to see."""
    stderr_console().print(text, soft_wrap=True, markup=False, highlight=False)
