"""Which values of its type an option takes, and the words that say so."""

from collections.abc import Mapping, Sequence
from math import inf

from attrs import frozen


@frozen
class Range:
    """The numbers an option takes: `at_least` and `at_most` are inclusive, `above` and `below` are not."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        """Whether `number` is finite and lies inside every bound."""
        return (
            abs(number) < inf
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return the bounds as a message says them."""
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


@frozen
class NotEmpty:
    """Any text, list or mapping but the empty one; the numbers in it, called `called`, lie inside `numbers`."""

    numbers: Range | None = None
    called: str = "weights"

    def __contains__(self, value: Sequence[object] | Mapping[str, object]) -> bool:
        """Whether `value` has an item that is not empty itself."""
        return len(value) > 0 and _filled(value) and _inside(value, self.numbers)

    def __str__(self) -> str:
        """Return the condition as a message says it."""
        return "not empty" if self.numbers is None else f"not empty, {self.called} {self.numbers}"


@frozen
class Filled:
    """Any mapping, the empty one too, whose keys and values are not empty themselves; its `numbers` lie inside."""

    numbers: Range | None = None

    def __contains__(self, value: Mapping[str, object]) -> bool:
        """Whether nothing in `value` is empty, and no number out of range."""
        return _filled(value) and _inside(value, self.numbers)

    def __str__(self) -> str:
        """Return the condition as a message says it."""
        return "none of it empty" if self.numbers is None else f"none of it empty, each {self.numbers}"


def _filled(value: Sequence[object] | Mapping[str, object]) -> bool:
    return all(item != "" for item in (*value, *(value.values() if isinstance(value, Mapping) else ())))


def _inside(value: Sequence[object] | Mapping[str, object], numbers: Range | None) -> bool:
    items = value.values() if isinstance(value, Mapping) else value
    return all(item in (numbers or Range()) for item in items if isinstance(item, int | float))
