"""Line charts as SVG text: no script, no font, no address; colours are the page's, so dark mode follows."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby

from mlx_trainer.monitoring.metrics import format_value

Series = tuple[Sequence[float], Sequence[float]]

_WIDTH, _HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 26
_MOST_POINTS, _MOST_MARKERS = 600, 40


def line_chart(title: str, series: Mapping[str, Series]) -> str:
    """Return a `<figure>` with one line for each name: (x values in order, y values).

    A value that is not finite interrupts its line. More than 600 points are drawn as the means of neighbours.
    """
    lines = {name: _thinned(list(zip(*points, strict=True))) for name, points in series.items()}
    finite = [point for points in lines.values() for point in points if math.isfinite(point[1])]
    if not finite:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>no finite value</p></figure>"
    x_ticks, y_ticks = nice_ticks([x for x, _ in finite]), nice_ticks([y for _, y in finite])
    scale = _Scale(x_ticks, y_ticks)
    drawn = "".join(_line(name, points, f"s{number}", scale) for number, (name, points) in enumerate(lines.items()))
    keys = "".join(f'<span class="key s{number}">{escape(name)}</span>' for number, name in enumerate(lines))
    return (
        f"<figure><figcaption>{escape(title)} {keys}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} over steps">'
        f"{_grid(scale)}{drawn}</svg></figure>"
    )


def nice_ticks(values: Sequence[float], wanted: int = 5) -> list[float]:
    """Return round numbers around the values: 1, 2 or 5 times a power of ten apart, about as many as are wanted."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= wanted)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    # Rounded, so that 3 x 0.1 is written 0.3.
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


class _Scale:
    """From values to pixels; both axes reach from their first tick to their last."""

    def __init__(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        self.x_ticks, self.y_ticks = x_ticks, y_ticks

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)


def _grid(scale: _Scale) -> str:
    right = _WIDTH - _RIGHT
    rows = (
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{scale.y(tick)}" y2="{scale.y(tick)}"/>'
        f'<text class="tick" x="{_LEFT - 8}" y="{scale.y(tick) + 4}" text-anchor="end">{format_value(tick)}</text>'
        for tick in scale.y_ticks
    )
    columns = (
        f'<text class="tick" x="{scale.x(tick)}" y="{_HEIGHT - 8}" text-anchor="middle">{format_value(tick)}</text>'
        for tick in scale.x_ticks
    )
    return "".join(rows) + "".join(columns)


def _line(name: str, points: Sequence[tuple[float, float]], style: str, scale: _Scale) -> str:
    parts = []
    for finite, group in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            path = " ".join(f"{scale.x(x)},{scale.y(y)}" for x, y in group)
            parts.append(f'<polyline class="line {style}" points="{path}"/>')
    if len(points) <= _MOST_MARKERS:
        parts += [
            f'<circle class="mark {style}" cx="{scale.x(x)}" cy="{scale.y(y)}" r="3">'
            f"<title>{escape(name)} {format_value(y)} at step {format_value(x)}</title></circle>"
            for x, y in points
            if math.isfinite(y)
        ]
    return "".join(parts)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
