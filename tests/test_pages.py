"""The pages on security and reliability name tests that exist, and the latter every row of the matrix of faults."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rows(page: str) -> list[str]:
    """The rows of the page's tables, without their heads."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    return [line for line, before in zip(lines[1:], lines, strict=False) if line.startswith("| ") and before[:1] == "|"]


def named(row: str) -> Iterator[tuple[Path, str]]:
    """The tests of a row: `file` or `file::name`, where `…::name` and `::name` are of the file named before."""
    file = Path()
    for place, function in re.findall(r"`((?:tests/)?[\w/]+\.py|…|)(?:::(\w+))?`", row):
        file = file if place in ("", "…") else ROOT / "tests" / place.removeprefix("tests/")
        yield file, function


def check(row: str) -> None:
    """Each file is there, and each name a function in it."""
    for file, function in named(row):
        assert file.is_file(), row
        assert not function or f"def {function}(" in file.read_text(), f"{file}::{function}"


def test_every_promise_of_security_has_a_test() -> None:
    """Each row names at least one."""
    assert len(rows("security.md")) > 10
    for row in rows("security.md"):
        assert list(named(row)), row
        check(row)


def test_every_fault_has_a_test_or_a_reason() -> None:
    """All seventy rows, each once."""
    matrix = {int(number): row for row in rows("reliability.md") if (number := row.split("|")[1].strip()).isdigit()}
    assert sorted(matrix) == list(range(1, 71))
    for row in matrix.values():
        assert list(named(row)) or "Not tried" in row, row
        check(row)
