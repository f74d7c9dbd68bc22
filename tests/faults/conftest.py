"""Campaigns of faults: short in `make test`, long in `make faults`, which prints what each has shown as a table."""

from collections.abc import Callable

import pytest

Tell = Callable[[str, str], None]


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """`campaign(short, long)`: how many faults to try in this run of the tests."""
    long = request.config.getoption("--faults")
    return lambda few, many: many if long else few


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Tell:
    """`tell(fault, result)` adds a row to the table of `make faults`."""
    return lambda fault, result: record_property("fault", (fault, result))
