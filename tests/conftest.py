"""What every test shares."""

import os
from typing import Any

# The workers of pytest-xdist share two cores, and OpenBLAS's waiting threads spin; read when mlx_trainer is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx.core as mx
import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # cores are shared: a single slow example means nothing
settings.load_profile("no deadline")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--faults`: the long campaigns of tests/faults, as `make faults` runs them."""
    parser.addoption("--faults", action="store_true", help="try as many faults as docs/reliability.md tells of")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the campaigns of faults have shown."""
    reports = [report for status in ("passed", "failed") for report in terminalreporter.stats.get(status, ())]
    told = [(value, report) for report in reports for key, value in report.user_properties if key == "fault"]
    if terminalreporter.config.getoption("--faults"):
        for (fault, result), report in told:
            terminalreporter.write_line(f"| {fault} | {result} | {report.outcome} | {report.nodeid} |")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MLX_TRAINER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _fresh_randomness() -> None:
    mx.random.seed(0)
