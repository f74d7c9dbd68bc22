"""One page about a run, made of the files in its folder; nothing in it is fetched from anywhere."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlx_trainer.monitoring.charts import line_chart
from mlx_trainer.monitoring.data_section import data_section
from mlx_trainer.monitoring.error import MonitoringError
from mlx_trainer.monitoring.files import read_json_lines, write_atomic
from mlx_trainer.monitoring.metrics import MetricsTracker, format_value
from mlx_trainer.monitoring.style import STYLE
from mlx_trainer.monitoring.table import table

_CHARTS = (
    ("Loss", ("train/loss", "val/loss")),
    ("Learning rate", ("train/lr",)),
    ("Tokens per second", ("train/tokens_per_second",)),
    ("Gradient norm", ("train/grad_norm",)),
    ("Memory, GB", ("memory/peak_gb", "memory/active_gb")),
)


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` from config.yaml, environment.json, metrics.jsonl and samples.jsonl, as far as they exist.

    Raises MonitoringError where the folder is missing or one of the files cannot be read.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise MonitoringError(f"there is no run folder {folder}")
    parts = [
        *_metrics_part(folder / "metrics.jsonl"),
        *_samples_part(folder / "samples.jsonl"),
        *_environment_part(folder / "environment.json"),
        *_config_part(folder / "config.yaml"),
    ]
    return write_atomic(folder / "report.html", _page(folder.resolve().name, parts or ["<p>Nothing was recorded.</p>"]))


def _page(name: str, parts: Iterable[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>\n{STYLE}</style></head>\n"
        f"<body><h1>{escape(name)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _metrics_part(path: Path) -> list[str]:
    if not path.exists():
        return []
    tracker = MetricsTracker.read(path)
    recorded = {name: tracker.series(name) for name in tracker.names()}
    charts = [
        line_chart(title, {name: recorded[name] for name in names if name in recorded})
        for title, names in _CHARTS
        if any(name in recorded for name in names)
    ]
    rows = [[name, *_figures(steps, values)] for name, (steps, values) in recorded.items()]
    figures = table(["metric", "first", "last", "lowest", "at step", "highest", "at step", "median"], rows)
    return [f'<div class="charts">{"".join(charts)}</div>', "<h2>Figures</h2>", figures]


def _figures(steps: Sequence[int], values: Sequence[float]) -> list[str]:
    finite = [(value, step) for value, step in zip(values, steps, strict=True) if math.isfinite(value)]
    if not finite:
        return [format_value(values[0]), format_value(values[-1]), "", "", "", "", ""]
    (low, low_step), (high, high_step) = min(finite), max(finite, key=lambda pair: (pair[0], -pair[1]))
    middle = statistics.median(value for value, _ in finite)
    cells = [values[0], values[-1], low, low_step, high, high_step, middle]
    return [format_value(cell) for cell in cells]


def _samples_part(path: Path) -> list[str]:
    if not path.exists():
        return []
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in read_json_lines(path):
        by_prompt.setdefault(_text(sample.get("prompt")), []).append(sample)
    return ["<h2>Samples</h2>", *(_sample(prompt, samples) for prompt, samples in by_prompt.items())]


def _sample(prompt: str, samples: Sequence[Mapping[str, Any]]) -> str:
    shown = [samples[0], samples[-1]] if len(samples) > 1 else samples
    texts = [(f"step {_text(sample.get('step'))}", sample.get("generated_text")) for sample in shown]
    if reference := samples[-1].get("reference"):
        texts.append(("reference", reference))
    columns = "".join(f"<div><h4>{escape(title)}</h4><pre>{escape(_text(text))}</pre></div>" for title, text in texts)
    return f'<section><h3>{escape(prompt)}</h3><div class="samples">{columns}</div></section>'


def _environment_part(path: Path) -> list[str]:
    if not path.exists():
        return []
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MonitoringError(f"cannot read {path}: {error}") from error
    data = facts.pop("data") if isinstance(facts.get("data"), Mapping) else {}
    rows = [[str(name), _text(value)] for name, value in facts.items()]
    return [*(data_section(data) if data else ()), "<h2>Environment</h2>", table(["", ""], rows)]


def _config_part(path: Path) -> list[str]:
    if not path.exists():
        return []
    return ["<h2>Configuration</h2>", f"<pre>{escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>"]


def _text(value: Any) -> str:
    """Return a value as people read it: text as it is, a list of words in a line, pairs one below the other."""
    if isinstance(value, Mapping):
        return "\n".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return "–" if value is None else str(value)
