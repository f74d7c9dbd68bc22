"""`mlx-trainer benchmark`: how fast a configuration trains on this machine, and how that compares."""

from mlx_trainer.benchmarking.comparing import Comparison, compare
from mlx_trainer.benchmarking.comparison_text import comparison_text
from mlx_trainer.benchmarking.extent import Extent
from mlx_trainer.benchmarking.measuring import Report, measure
from mlx_trainer.benchmarking.text import report_text

__all__ = ["Comparison", "Extent", "Report", "as_text", "compare", "measure"]


def as_text(found: Report | Comparison) -> str:
    """Return all figures for people."""
    return comparison_text(found) if isinstance(found, Comparison) else report_text(found)
