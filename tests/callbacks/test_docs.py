import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import mlx_trainer
from mlx_trainer import callbacks
from mlx_trainer.callback import HOST_EVENTS, TRACED_EVENTS
from mlx_trainer.trainer import Trainer
from tests.callbacks.toy import Regression, batches

TEXT = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
MODULES = sorted(path.stem for path in Path(callbacks.__file__).parent.glob("*.py"))


@pytest.fixture
def shown() -> dict[str, Any]:
    """Run the page's Python blocks, in order, and return what they define."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)  # noqa: S102 - our own page
    return names


def test_the_first_example_stops_a_run(shown: dict[str, Any]) -> None:
    """It is given to a trainer on the page; that trainer stops where the callback asks it to."""
    result = Trainer(max_epochs=50, log_every=5, callbacks=[shown["Thermometer"](enough=1.5)]).fit(
        Regression(), batches()
    )
    assert result.stop_reason == "the loss is below 1.5"


def test_the_second_example_prints(shown: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The last trainer of the page prints at its end how many rows it has seen."""
    shown["trainer"].fit(Regression(), batches())
    assert capsys.readouterr().out == "18 rows in 6 steps\n"


def test_the_example_with_state_keeps_it(shown: dict[str, Any]) -> None:
    """What one gives, another takes."""
    first, second = shown["Best"](), shown["Best"]()
    Trainer(callbacks=[first, callbacks.Evaluation()]).fit(Regression(), batches(), batches(2, seed=1))
    second.load_state_dict(first.state_dict())
    assert second.lowest == first.lowest < float("inf")


def test_the_traced_example_takes_part_in_the_step(shown: dict[str, Any]) -> None:
    """Its scalar is logged, and its guard lets the updates through."""
    result = Trainer(callbacks=[shown["SignDescent"]()], log_every=6).fit(Regression(), batches())
    assert result.metrics["train/zero_gradients"] >= 0


def test_every_event_is_on_the_page() -> None:
    """None is missing from the timeline or from the traced pair."""
    assert [event for event in (*HOST_EVENTS, *TRACED_EVENTS) if f"`{event}" not in TEXT] == []


def test_every_callback_is_in_the_table() -> None:
    """The rows are the callbacks that the package exports."""
    rows = re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|$", TEXT[TEXT.index("## What ships") :], re.MULTILINE)
    assert sorted(rows) == sorted(callbacks.__all__)
    assert [name for name in callbacks.__all__ if getattr(mlx_trainer, name) is not getattr(callbacks, name)] == []


@pytest.mark.parametrize("name", callbacks.__all__)
def test_each_docstring_says_what_it_costs(name: str) -> None:
    """A user can add a callback without wondering."""
    assert "\n    Costs " in str(getattr(callbacks, name).__doc__)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name: str) -> None:
    """Each doctest of the room gives what it shows."""
    module = importlib.import_module(f"mlx_trainer.callbacks.{name}".removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0
