"""docs/security.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_has_a_test_that_exists() -> None:
    """Each row names a file of tests, and each `file::name` is a function of it; `…` is the file named before."""
    rows = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py|…)(?:::(\w+))?`", row)
        assert named, row
        file = ""
        for place, function in named:
            file = file if place == "…" else place
            assert (ROOT / file).exists(), row
            assert not function or f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"
