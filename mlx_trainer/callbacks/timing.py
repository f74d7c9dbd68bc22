"""When a callback's turn is."""


def check_every(every: int | None, owner: str) -> int | None:
    """Return `every`, a number of steps or None. Raises ValueError for a number below 1."""
    if every is not None and every < 1:
        raise ValueError(f"{owner}: every is {every}; it must be 1 or more steps")
    return every
