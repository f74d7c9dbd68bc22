"""glibc's malloc, which MLX takes its arrays from on a Linux CPU, told to keep what is freed.

By itself it gives large blocks back to the system at once, and the next array is fetched anew, page by page. MLX's own
cache is for arrays of one size: batches of eight shapes fill it with ten times what a step needs. glibc's heap serves
any size from what was freed.
"""

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
LARGEST = 1 << 25
"""Blocks from 32 MB on are given back in any case: glibc allows no higher threshold on 64 bits. MLX keeps one."""
KEPT = 1 << 30
"""So many bytes may lie free at the heap's end."""


@cache
def keep_freed() -> bool:
    """Let malloc keep what this process frees, and return whether it does; other C libraries have no such switch."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEPT))
