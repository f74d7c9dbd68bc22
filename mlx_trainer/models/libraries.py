"""The one place that knows what importing mlx_lm and transformers does to the process, and undoes it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

ADVISORIES = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import mlx_lm or transformers inside: limits and environment stay as they were, and nothing is printed.

    mlx_lm sets the limit of open files to 2048, hard limit included, which a process without privileges cannot raise
    again; so the call is replaced, not undone. transformers prints on every import that PyTorch was not found.
    """
    import resource

    advisories = os.environ.get(ADVISORIES)
    os.environ[ADVISORIES] = "1"
    set_limit = resource.setrlimit

    def raise_soft_limit(kind: int, wanted: tuple[int, int]) -> None:
        set_limit(kind, raised(resource.getrlimit(kind), wanted[0], resource.RLIM_INFINITY))

    resource.setrlimit = raise_soft_limit
    try:
        yield
    finally:
        resource.setrlimit = set_limit
        del os.environ[ADVISORIES]
        if advisories is not None:
            os.environ[ADVISORIES] = advisories


def raised(limits: tuple[int, int], wanted: int, infinity: int) -> tuple[int, int]:
    """Return (soft, hard) `limits` with the soft one raised to `wanted` where the hard one allows it, never lowered.

    >>> raised((256, 1024), 2048, -1), raised((4096, -1), 2048, -1)
    ((1024, 1024), (4096, -1))
    """
    soft, hard = limits
    if soft == infinity:
        return limits
    return max(soft, wanted if hard == infinity else min(wanted, hard)), hard
