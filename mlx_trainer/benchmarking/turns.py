"""Who takes turns in a comparison, and how: each turn is a process of its own, so that memory and caches do not mix."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import cattrs
from attrs import evolve, frozen

from mlx_trainer import _blas, runtime
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.measuring import Report
from mlx_trainer.benchmarking.peer_clock import PeerReport
from mlx_trainer.config import ConfigError
from mlx_trainer.trainer import TrainingError

PACKAGES = Path(__file__).parents[2]


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
        given = (("--steps", extent.steps), ("--warmup", extent.warmup))
        options = [word for option, value in given if value is not None for word in (option, str(value))]
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

    Where we replace MLX's BLAS, mlx-lm runs with ours too. As installed its steps are so slow there that compiling is
    nothing beside them, and one of them is warm-up enough.
    """
    wanted = os.environ.get(_blas.VARIABLE, "").lower() not in _blas.OFF
    if not (wanted and sys.platform == "linux" and runtime.backend() == "cpu"):
        return [OURS, PEER]
    return [OURS, evolve(PEER, name="mlx_lm_same_blas"), evolve(PEER, variables={_blas.VARIABLE: "off"}, warmup=1)]


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
