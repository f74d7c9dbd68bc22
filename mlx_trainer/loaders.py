"""Loaders as the trainer sees them: any sized iterable of batches, cut into windows of micro-batches."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any, Protocol, runtime_checkable

logger = logging.getLogger(__name__)


@runtime_checkable
class Loader(Sized, Iterable[Any], Protocol):
    """A sized iterable of batches; iterating it again is the next epoch."""


@runtime_checkable
class ResumableLoader(Loader, Protocol):
    """A loader that knows its position, so that a resumed run need not replay it."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch taken, as JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to that position; the next iteration continues there."""


@runtime_checkable
class DataSource(Protocol):
    """What `fit(module, data)` takes: it makes the loaders."""

    def train_loader(self) -> Loader:
        """The batches to train on."""

    def validation_loader(self) -> Loader | None:
        """The batches to validate on, or None."""


@runtime_checkable
class LayoutSource(DataSource, Protocol):
    """A data source whose batches come in several layouts."""

    def use_layout(self, training: str, validation: str) -> None:
        """Make batches of these layouts, unless the user has chosen one."""


def resolve(
    data: DataSource | Loader, validation: Loader | None, layout: str | None = None, *, metrics: bool = False
) -> tuple[Loader, Loader | None]:
    """The two loaders of a run. Raises TypeError or ValueError for what cannot be trained on.

    A source that has several layouts is asked for `layout`; with `metrics` of the user's own, held-out batches stay
    padded, as those are what such functions are written for.
    """
    if isinstance(data, LayoutSource) and layout is not None:
        data.use_layout(layout, "padded" if metrics else layout)
    if isinstance(data, DataSource):
        train, validation = data.train_loader(), validation or data.validation_loader()
    else:
        train = data
    for loader in (train, validation):
        if loader is not None and not isinstance(loader, Loader):
            raise TypeError(f"a loader is a sized iterable of batches (a list will do), not a {type(loader).__name__}")
    if len(train) == 0:
        raise ValueError("the training loader is empty: there is no batch to train on")
    return train, validation


def limited(
    train: Loader, validation: Loader | None, overfit: int, limit: int | float | None
) -> tuple[Loader, Loader | None]:
    """The first `overfit` batches as both loaders, unless it is 0, and `limit` of the held-out ones."""
    if overfit:
        train = validation = first_batches(train, overfit)
    return train, None if validation is None else first_batches(validation, limit)


def place(loader: Loader) -> dict[str, Any] | None:
    """What a resumable loader says of its position, None for any other."""
    return loader.state_dict() if isinstance(loader, ResumableLoader) else None


def first_batches(loader: Loader, limit: int | float | None) -> Loader:
    """The first `limit` batches (a float is a share of them), kept in memory; the loader itself where limit is None."""
    if limit is None:
        return loader
    amount = math.ceil(limit * len(loader)) if isinstance(limit, float) else limit
    return list(islice(loader, amount))


def windows(loader: Loader, accumulate: int, position: int) -> Iterator[Sequence[Any]]:
    """The rest of an epoch, from micro-batch `position` on, in windows of `accumulate`; the last may be shorter.

    Takes no batch ahead of its window, so that a loader's own position is right whenever a step is done.
    """
    batches = iter(loader if position == 0 or isinstance(loader, ResumableLoader) else fast_forward(loader, position))
    while window := list(islice(batches, min(accumulate, len(loader) - position))):
        position += len(window)
        yield window
    next(batches, None)  # lets the loader see the end of its epoch


def fast_forward(loader: Loader, position: int) -> Iterable[Any]:
    """The loader's next epoch without its first `position` batches."""
    logger.warning(
        "%s has no load_state_dict, so %d batches are drawn again to find the place; what it draws at random differs",
        type(loader).__name__,
        position,
    )
    return islice(loader, position, None)
