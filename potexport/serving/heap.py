"""What the C library keeps of memory that was freed."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h. A chunk of at least so many bytes comes from the system, and goes back to it.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGE = 1 << 20  # bytes: bodies of requests, and answers of whole conversations
ARENAS = 2  # a thread of the loop, a thread of the model


def give_back() -> None:
    """Have glibc give back what is freed; with another C library nothing changes.

    By itself it takes the largest chunk that was ever freed, up to 32 MiB, for what it shall keep
    from then on, twice as much at the end of each arena: after one large body a server's memory
    moves by tens of megabytes with the chance of what ran at once (mallopt(3)).
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, LARGE)
        library.mallopt(TRIM_THRESHOLD, LARGE)
        library.mallopt(ARENA_MAX, ARENAS)
