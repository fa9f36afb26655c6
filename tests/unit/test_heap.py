"""What a server gives back, in a process of its own: the C library is changed for good."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc, re, weakref
from potexport.serving import heap

def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

class Node:
    pass

gc.disable()  # so that nothing but `tidy` collects
heap.SECONDS = {seconds}
mine = heap.Heap()
old = Node()
old.itself = old
mine.settle()
blocks = [bytes(2000) for _ in range(40_000)]  # 80 MB from glibc
blocks = blocks[::100]  # what stays is spread over all of it
new = Node()
new.itself = new
seen = weakref.ref(new), weakref.ref(old)
del new, old
before = held()
mine.tidy()
print(before - held(), [each() is None for each in seen])
"""
ROOT = Path(__file__).parents[2]


def tidied(seconds: float) -> tuple[float, str]:
    """Megabytes that were given back, and which of the objects are gone."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(seconds=seconds)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    count, _, gone = done.stdout.strip().partition(" ")
    return float(count), gone


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps pages")
def test_pages_between_blocks_and_circles_of_objects_are_given_back() -> None:
    given, gone = tidied(seconds=0)
    assert given > 50
    assert gone == "[True, False]"  # what was there when it settled is not looked at again


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps pages")
def test_not_twice_in_a_moment() -> None:
    given, gone = tidied(seconds=60)
    assert given < 10
    assert gone == "[False, False]"
