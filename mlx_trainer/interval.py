"""The steps since the last log: kept as lazy arrays, read all at once."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from mlx_trainer.step import StepOutput
from mlx_trainer.traced import number


@attrs.frozen
class StepRecord:
    """One step, read."""

    step: int
    loss: float
    metadata: Sequence[Any]
    """`batch.metadata` of its micro-batches: for a language model, where the rows came from."""
    refused_by: Sequence[str] = ()
    """Names of the callbacks, such as NaNGuard, that kept the update from being made."""
    values: Mapping[str, float] = attrs.field(factory=dict)
    """The scalars that transforms reported."""

    @property
    def accepted(self) -> bool:
        """Whether the update was made."""
        return not self.refused_by


class LogInterval:
    """Collects steps without reading them; `read` gives their means and starts anew.

    `counts` are the run's totals (`TrainingState.counts`) at the start and at the end of the interval.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._steps: list[tuple[int, StepOutput, Sequence[Any]]] = []
        self._counts = dict(counts)
        self._start = time.perf_counter()

    def add(self, step: int, output: StepOutput, metadata: Sequence[Any]) -> None:
        """Keep one step."""
        self._steps.append((step, output, metadata))

    def skip_time(self, seconds: float) -> None:
        """Leave out time spent on something else, such as an evaluation."""
        self._start += seconds

    def read(self, counts: Mapping[str, int]) -> tuple[dict[str, float], tuple[StepRecord, ...]]:
        """The means by TensorBoard tag, and each step. Waits for the last of them to be computed."""
        used = {name: count - self._counts.get(name, 0) for name, count in counts.items()}
        outputs = [output for _, output, _ in self._steps]
        records = tuple(_record(*each) for each in self._steps)
        metrics = _means(outputs, records)
        seconds, steps = time.perf_counter() - self._start, len(outputs)
        metrics["perf/step_ms"] = 1000 * seconds / steps
        metrics |= {f"train/{name}_per_second": count / seconds for name, count in used.items()}
        if used.get("positions"):
            metrics["perf/padding"] = 1 - (used["tokens"] - used.get("shared_tokens", 0)) / used["positions"]
        self.__init__(counts)  # type: ignore[misc]
        return metrics, records

    def __len__(self) -> int:
        return len(self._steps)


def _means(outputs: Sequence[StepOutput], records: Sequence[StepRecord]) -> dict[str, float]:
    """Per token for the module's sums, per step for the values of transforms; the last learning rate."""
    weight = sum(number(output.weight) for output in outputs)
    sums = [{"loss": output.total, **output.metrics} for output in outputs]
    means = {f"train/{name}": sum(number(each[name]) for each in sums) / (weight or float("nan")) for name in sums[0]}
    for name in records[0].values:
        means[f"train/{name}"] = sum(record.values[name] for record in records) / len(records)
    if outputs[-1].learning_rate is not None:
        means["train/lr"] = number(outputs[-1].learning_rate)
    return means


def _record(step: int, output: StepOutput, metadata: Sequence[Any]) -> StepRecord:
    weight = number(output.weight)
    loss = number(output.total) / weight if weight else float("nan")
    refused_by = [name for name, accepted in output.verdicts.items() if not accepted.item()]
    return StepRecord(step, loss, metadata, refused_by, {name: number(value) for name, value in output.values.items()})
