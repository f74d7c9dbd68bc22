"""Rows that are there twice: on one side they count double, on both they make the validation loss too low."""

import hashlib
import logging
from collections.abc import Iterable, Sequence

from attrs import frozen

from mlx_trainer.data.rows import TokenRow

logger = logging.getLogger("mlx_trainer.data")


@frozen
class Leak:
    """Sources of a held-out row and of the first training row that is the same."""

    held_out: str
    trained: str


def fingerprint(row: TokenRow) -> bytes:
    """16 bytes that are equal for rows of the same ids and the same trained mask, as they are after the cut."""
    digest = hashlib.blake2b(row.ids.tobytes(), digest_size=16)
    digest.update(row.trained.tobytes())
    return digest.digest()


def count_repeats(rows: Sequence[TokenRow]) -> int:
    """How many of `rows` are the same as an earlier one of them."""
    return len(rows) - len({fingerprint(row) for row in rows})


def find_leaks(train: Iterable[TokenRow], held_out: Iterable[TokenRow]) -> tuple[Leak, ...]:
    """The rows of `held_out` that are in `train` too."""
    trained: dict[bytes, str] = {}
    for row in train:
        trained.setdefault(fingerprint(row), row.source)
    return tuple(Leak(row.source, trained[key]) for row in held_out if (key := fingerprint(row)) in trained)


def tell_leaks(leaks: Sequence[Leak], held_out: int) -> None:
    """Warn of `leaks`, if there are any, of `held_out` rows, with the first of them."""
    if leaks:
        logger.warning(
            "%d of %d held-out rows are trained too, first %s, which is the same as %s: the validation loss will be "
            "too low. Take such rows out of one side",
            *(len(leaks), held_out, leaks[0].held_out, leaks[0].trained),
        )
