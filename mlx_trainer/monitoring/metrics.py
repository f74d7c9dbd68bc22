"""The history of a run's metrics: kept, read back, tabulated, plotted, exported."""

import difflib
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Self

from mlx_trainer.monitoring.error import MonitoringError
from mlx_trainer.monitoring.event_file import EventFile
from mlx_trainer.monitoring.files import NON_FINITE, make_folder, read_json_lines


class MetricsTracker:
    """Named values by optimizer step. A value recorded again for a step replaces the first, as after resuming.

    >>> tracker = MetricsTracker()
    >>> tracker.record(10, {"train/loss": 2.5, "train/lr": 1e-4})
    >>> tracker.record(20, {"train/loss": 1.25})
    >>> tracker.series("train/loss")
    ([10, 20], [2.5, 1.25])
    >>> print(tracker.table())
    step  train/loss  train/lr
      10         2.5    0.0001
      20        1.25
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float]] = {}

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a `metrics.jsonl`: of each line the `step` and every number, "NaN" and "Infinity" included.

        Raises MonitoringError with the line for one that is not a JSON object or has no whole number as its step.
        """
        tracker = cls()
        for number, row in enumerate(read_json_lines(path), 1):
            step = row.pop("step", None)
            if not isinstance(step, int):
                raise MonitoringError(f'{path}: record {number} has no whole number as "step": {step!r}')
            tracker.record(step, _numbers(row))
        return tracker

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of an optimizer step."""
        self._rows.setdefault(step, {}).update((name, float(value)) for name, value in values.items())

    def names(self) -> list[str]:
        """Return the names of all metrics, in the order in which they were first recorded."""
        return list(dict.fromkeys(name for row in self._rows.values() for name in row))

    def history(self) -> list[dict[str, float]]:
        """Return one row a step, in the order of steps: `step`, and the values recorded for it."""
        return [{"step": step, **self._rows[step]} for step in sorted(self._rows)]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a metric was recorded, and its values; raise MonitoringError for an unknown one."""
        if name not in self.names():
            near = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.names()) or 'none'}"
            raise MonitoringError(f"no metric {name!r} was recorded; {hint}")
        steps = [step for step in sorted(self._rows) if name in self._rows[step]]
        return steps, [self._rows[step][name] for step in steps]

    def table(self, names: Iterable[str] | None = None) -> str:
        """Return the history as plain text: a column a metric (all, or those named), four significant digits."""
        chosen = list(names) if names is not None else self.names()
        shown = [row for row in self.history() if any(name in row for name in chosen)]
        cells = [["step", *chosen]]
        cells += [
            [str(row["step"]), *(format_value(row[name]) if name in row else "" for name in chosen)] for row in shown
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)).rstrip() for line in cells)

    def plot(self, name: str, path: str | Path) -> Path:
        """Draw a metric over the steps into a PNG file and return its path; needs the extra `mlx-trainer[plot]`."""
        steps, values = self.series(name)
        try:
            # A figure of its own, not pyplot: no window, no back end chosen for the whole program.
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise MonitoringError("plots need matplotlib: pip install 'mlx-trainer[plot]'") from error
        make_folder(Path(path).parent)
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=name)
        axes.plot(steps, values, marker="." if len(steps) <= 50 else "")
        axes.grid(alpha=0.3)
        figure.savefig(path, format="png")
        return Path(path)

    def to_tensorboard(self, directory: str | Path) -> None:
        """Write the whole history as TensorBoard scalars, tags being the names and the x axis the steps."""
        with closing(EventFile(Path(directory))) as file:
            for step in sorted(self._rows):
                file.add_scalars(step, self._rows[step])


def format_value(value: float) -> str:
    """Return a number with four significant digits and without an exponent where a person would write none."""
    if not abs(value) < 1e9:
        return f"{value:.4g}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"


def _numbers(row: Mapping[str, object]) -> dict[str, float]:
    """Return the fields that are numbers, or the name of one that is not finite."""
    read = {name: NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in row.items()}
    return {
        name: float(value)
        for name, value in read.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
