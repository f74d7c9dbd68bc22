"""A comparison as people read it."""

from collections.abc import Iterator

from mlx_trainer.benchmarking.comparing import Comparison, Turn
from mlx_trainer.benchmarking.text import report_text
from mlx_trainer.benchmarking.turns import OURS
from mlx_trainer.benchmarking.units import duration, figure, memory

FIRST, WIDTH, RATIO = 24, 22, 8


def comparison_text(comparison: Comparison) -> str:
    """Return our figures, then the table that sets them beside the others'."""
    return "\n".join([report_text(comparison.ours), *table(comparison)])


def table(comparison: Comparison) -> Iterator[str]:
    """Yield the lines of the table: a column each, and behind each of the others the ratio."""
    peers = [name for name in comparison.turns if name != OURS.name]
    ratios = {name: comparison.ratios(name) for name in peers}
    ours = comparison.turns[OURS.name]
    alone = len(peers) == 1
    yield "\nbeside mlx_lm's own trainer, each in a process of its own; ratio: ours through theirs"
    names = {"mlx_lm": "mlx_lm" if alone else "mlx_lm as installed", "mlx_lm_same_blas": "mlx_lm, our BLAS"}
    yield _row("", OURS.name, [(names[name], "ratio") for name in peers])
    for label, key in ROWS.items():
        cells = [
            (_cell(key, comparison.turns[name]), f"{ratios[name][key]:.2f}" if key in ratios[name] else "")
            for name in peers
        ]
        yield _row(label, _cell(key, ours), cells)


ROWS = {
    "real tokens/s": "tokens_per_s",
    "an update": "step_ms",
    "peak memory": "peak_gb",
    "the first epoch": "first_epoch_s",
    "first step after": "first_step_s",
    "  when it was cold": "cold_first_step_s",
}


def _cell(key: str, turn: Turn) -> str:
    value: float = getattr(turn, key)
    if key == "tokens_per_s":
        return figure(value)
    if key == "step_ms":
        return f"{figure(value)} ms"
    if key == "peak_gb":
        return f"{'' if turn.longest_seen else 'at least '}{memory(value)}"
    about = "about " if key == "first_epoch_s" and turn.epoch_estimated else ""
    return about + duration(value)


def _row(label: str, ours: str, peers: list[tuple[str, str]]) -> str:
    cells = "".join(f"{theirs:>{WIDTH}}{ratio:>{RATIO}}" for theirs, ratio in peers)
    return f"  {label:<{FIRST - 2}}{ours:>{WIDTH - 4}}{cells}".rstrip()
