"""The report's section on the data: the figures, warnings and rows that `environment.json` has under `data`."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mlx_trainer.monitoring.table import table
from mlx_trainer.monitoring.visible import visible

_FIGURES: Mapping[str, Mapping[str, str]] = {
    "Rows": {
        "rows": "read",
        "bad_rows": "bad",
        "truncated_rows": "truncated",
        "split_rows": "split",
        "dropped_rows": "dropped",
        "duplicate_rows": "duplicates",
        "leaked_rows": "held out and trained too",
        "train_rows": "to train on",
        "validation_rows": "held out",
    },
    "Tokens": {
        "tokens": "in all",
        "trained_tokens": "trained",
        "trained_share": "share that is trained",
        "length_p50": "length of a row, p50",
        "length_p95": "p95",
        "length_max": "longest",
    },
    "Batches": {
        "batches": "in an epoch",
        "shapes": "distinct shapes",
        "layout": "layout",
        "padding_share": "padding",
        "positions_per_token": "positions computed per token",
        "shared_tokens": "tokens of shared prefixes, not computed again",
        "steps_per_epoch": "optimizer steps in an epoch",
        "total_steps": "optimizer steps in all",
    },
}
_SHAPE = {
    "rows": "rows",
    "prefix": "shared prefix",
    "length": "tokens each",
    "positions": "positions",
    "batches": "batches",
}
_MARKS = {True: '<mark class="trained">', False: "<mark>", None: '<mark class="remark">'}


def data_section(data: Mapping[str, Any]) -> list[str]:
    """Return the section as HTML; what `data` has not is left out."""
    groups = [
        _group(title, [(name, data[key], key) for key, name in names.items() if key in data])
        for title, names in _FIGURES.items()
    ]
    return [
        "<h2>Data</h2>",
        *_warnings(_items(data, "warnings")),
        f'<div class="groups">{"".join(groups)}{_shapes(_items(data, "used_shapes"))}</div>',
        *map(_example, _items(data, "examples")),
    ]


def _items(data: Mapping[str, Any], name: str) -> Sequence[Any]:
    items = data.get(name)
    return items if isinstance(items, list) else []


def _group(title: str, figures: Sequence[tuple[str, Any, str]]) -> str:
    rows = [[name, _figure(value, key)] for name, value, key in figures]
    return f"<div><h3>{title}</h3>{table(['', ''], rows)}</div>" if rows else ""


def _figure(value: Any, key: str) -> str:
    """Return a figure as people read it: shares in percent, thousands apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return visible(str(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1%}" if key.endswith("_share") else f"{value:.2f}"


def _shapes(shapes: Sequence[Any]) -> str:
    shapes = [shape for shape in shapes if isinstance(shape, Mapping)]
    columns = {key: name for key, name in _SHAPE.items() if any(shape.get(key) for shape in shapes)}
    rows = [[_figure(shape.get(key), key) for key in columns] for shape in shapes]
    return f"<div><h3>Shapes</h3>{table(list(columns.values()), rows)}</div>" if rows else ""


def _warnings(sentences: Sequence[Any]) -> list[str]:
    lines = "".join(f"<li>{escape(visible(str(sentence)))}</li>" for sentence in sentences)
    return [f'<ul class="warnings">{lines}</ul>'] if lines else []


def _example(example: Any) -> str:
    """Return a row; each span is an element of its own, so that a line end at the beginning of `pre` stays."""
    if not isinstance(example, Mapping):
        return ""
    spans = [span for span in _items(example, "spans") if isinstance(span, Mapping)]
    texts = (
        f"{_MARKS.get(span.get('trained'), '<mark>')}{escape(visible(str(span.get('text'))))}</mark>" for span in spans
    )
    title = escape(visible(str(example.get("source"))))
    heading = f'<h3>{title}, <mark class="trained">trained text</mark> marked</h3>'
    return f"<section>{heading}<pre>{''.join(texts)}</pre></section>"
