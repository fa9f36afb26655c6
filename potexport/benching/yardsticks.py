"""What this machine can do, so that other figures can be shares of it.

Memory: a copy as in STREAM, counted as STREAM counts it, each byte read and written once.
Products: two square matrices of float32, by numpy's own BLAS, which is told the number of threads
when the process is started (`workers.THREADS`).
"""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from potexport.runtime.provider import cores

CACHES = 4  # so many times the last-level cache do both arrays take together
LEAST = 512 << 20  # bytes of both, where nobody tells the cache's size
SIDE = 1536  # of the matrices: three of 9 MB
REPEATS = 3


class Yardsticks:
    """Both arrays, the matrices, and as many threads as the parties have."""

    def __init__(self, threads: int) -> None:
        self.threads, self.bytes = threads, both_arrays()
        self._from = np.ones(self.bytes // 16)
        self._to = np.zeros_like(self._from)
        shape = (SIDE, SIDE)
        self._a, self._b = np.ones(shape, np.float32), np.ones(shape, np.float32)
        self._product = np.zeros(shape, np.float32)
        self._pool = ThreadPoolExecutor(threads)
        self.copy()
        self.products()

    def facts(self) -> dict[str, Any]:
        return {"copied_bytes": self._from.nbytes, "last_level_cache": last_level_cache(),
                "matrix_side": SIDE, "numpy": np.__version__}  # fmt: skip

    def copy(self) -> list[float]:
        """Bytes a second, read and written together."""
        return [2 * self._from.nbytes / self._timed(self._copy) for _ in range(REPEATS)]

    def _copy(self) -> None:
        edges = np.linspace(0, self._from.size, self.threads + 1).astype(int)

        def part(number: int) -> None:  # numpy lets other threads run while it copies
            piece = slice(edges[number], edges[number + 1])
            np.copyto(self._to[piece], self._from[piece])

        list(self._pool.map(part, range(self.threads)))

    def products(self) -> list[float]:
        """Floating-point operations a second."""

        def multiply() -> None:
            np.matmul(self._a, self._b, out=self._product)

        return [2 * SIDE**3 / self._timed(multiply) for _ in range(REPEATS)]

    @staticmethod
    def _timed(action: Any) -> float:
        started = perf_counter()
        action()
        return perf_counter() - started

    def both(self) -> tuple[float, float]:
        """One turn: bytes a second, operations a second."""
        return median(self.copy()), median(self.products())


def both_arrays() -> int:
    """Bytes of both: well beyond the last-level cache, and at most a quarter of free memory."""
    return min(max(CACHES * (last_level_cache() or 0), LEAST), free_memory() // 4)


def last_level_cache() -> int | None:
    """Bytes, of the largest that the system tells of; None where it tells of none."""
    found = []
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text().strip()
        found.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(found, default=None)


def free_memory() -> int:
    """Bytes that a program may take now; a guess where the system does not say."""
    found = _lines("/proc/meminfo", "MemAvailable")
    return int(found.split()[0]) * 1024 if found else 4 * LEAST


def machine() -> dict[str, Any]:
    """In words, for a page; nothing that names it."""
    memory = _lines("/proc/meminfo", "MemTotal")
    flags = (_lines("/proc/cpuinfo", "flags") or "").split()
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
    return {
        "cpu": _lines("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "cores": cores(),
        "flags": [flag for flag in known if flag in flags],
        "memory": int(memory.split()[0]) * 1024 if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _lines(path: str, key: str) -> str | None:
    """What stands behind a key, in a file of such lines."""
    try:
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return None
