"""What a run says about itself: log lines, memory readings, metric history, environment facts and a report."""

from mlx_trainer.monitoring.console import stderr_console
from mlx_trainer.monitoring.environment import environment_facts, write_environment
from mlx_trainer.monitoring.error import MonitoringError
from mlx_trainer.monitoring.files import JsonLines, make_folder, read_json_lines, write_atomic
from mlx_trainer.monitoring.logging import setup_logging
from mlx_trainer.monitoring.memory import MemoryStats, check_available, log_memory, read_memory
from mlx_trainer.monitoring.metrics import MetricsTracker
from mlx_trainer.monitoring.report import write_report
from mlx_trainer.monitoring.secrets import mask_secrets
from mlx_trainer.monitoring.visible import visible

__all__ = [
    "JsonLines",
    "MemoryStats",
    "MetricsTracker",
    "MonitoringError",
    "check_available",
    "environment_facts",
    "log_memory",
    "make_folder",
    "mask_secrets",
    "read_json_lines",
    "read_memory",
    "setup_logging",
    "stderr_console",
    "visible",
    "write_atomic",
    "write_environment",
    "write_report",
]
