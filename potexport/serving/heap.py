"""What a server's process keeps of memory that it no longer needs, and giving it back.

Under load Python and glibc each keep some for later: objects that refer to each other wait for a
whole collection, which comes when a quarter more of them have piled up, and pages between two
blocks in use stay where they are. Both creep for hours.
"""

from __future__ import annotations

import ctypes
import gc
import platform
from time import perf_counter

# Of glibc's malloc.h. A chunk of at least so many bytes comes from the system, and goes back to it.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8
LARGE = 1 << 20  # bytes: bodies of requests, and answers of whole conversations
ARENAS = 2  # a thread of the loop, a thread of the model
SECONDS = 5.0  # between two times that it is tidied, which takes some 6 ms


class Heap:
    """Of this process; with another C library than glibc Python's own part remains."""

    def __init__(self) -> None:
        """To be made before memory is used.

        glibc by itself takes the largest chunk that was ever freed, up to 32 MiB, for what it shall
        keep from then on, twice as much at the end of each arena: after one large body a server's
        memory moves by tens of megabytes with the chance of what ran at once (mallopt(3)).
        """
        self._library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
        if self._library:
            self._library.mallopt(MMAP_THRESHOLD, LARGE)
            self._library.mallopt(TRIM_THRESHOLD, LARGE)
            self._library.mallopt(ARENA_MAX, ARENAS)
        self._tidied = perf_counter()

    def settle(self) -> None:
        """What there is now stays: collections do not look at it again."""
        gc.collect()
        gc.freeze()

    def tidy(self) -> None:
        """Give back what is not in use, unless that was done a moment ago (malloc_trim(3))."""
        now = perf_counter()
        if now - self._tidied < SECONDS:
            return
        self._tidied = now
        gc.collect()
        if self._library:
            self._library.malloc_trim(0)
