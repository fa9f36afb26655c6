"""Who has a turn when, and what becomes of who is too slow, or dies."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest

from potexport.benching.figures import Party, Spread
from potexport.benching.readers import Held
from potexport.benching.turns import Entry, Turns
from potexport.benching.workers import Worker
from potexport.errors import PotexportError
from potexport.runtime.ids import Ids

IDS = np.arange(9000, dtype=np.int32)


class Writing:
    """A reader that writes down what it is asked, and knows nothing. slow: seconds a piece."""

    def __init__(self, name: str, log: Path, slow: float = 0.0, dies: bool = False) -> None:
        self.name, self.log, self.slow, self.dies = name, log, slow, dies
        self.tokens = self.marked = 0

    def _write(self, what: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{self.name} {what}\n")

    def read(self, ids: Ids) -> None:
        assert ids[0] == self.tokens  # what comes next, and nothing twice
        self.tokens += ids.size
        self._write(f"read {self.tokens}")
        sleep(self.slow)
        if self.dies:
            os.kill(os.getpid(), signal.SIGSEGV)

    def following(self) -> int:
        return 0

    def step(self, token: int) -> int:
        self.tokens += 1
        return 0

    def mark(self) -> None:
        self.marked = self.tokens

    def back(self) -> None:
        self._write(f"decoded {self.tokens - self.marked} after {self.marked}")
        self.tokens = self.marked

    def reset(self) -> None:
        self.tokens = 0


class Machine:
    """The yardsticks, without their seconds."""

    def both(self) -> tuple[float, float]:
        return 2.0, 3.0


def _entry(name: str, log: Path, patience: float | None = 100.0, **how: Any) -> Entry:
    def make(_: int) -> Worker:
        return Worker(Held, partial(Writing, name, log, **how), threads=1)

    kind = "peer" if patience else "bundle"
    return Entry(Party(name, kind, "", "", 1, 1, 1), make, patience)


def _measure(entries: list[Entry], tokens: int, rounds: int = 2) -> None:
    with Worker(Machine, threads=1) as machine:
        turns = Turns(entries, IDS[:tokens], machine, rounds=rounds)
        turns.measure(openings=1, on_stage=lambda _: None)


def test_all_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    entries = [_entry("a", log), _entry("b", log)]
    _measure(entries, 1000)
    once = ["a read 1000", "b read 1000"]
    steps = ["a decoded 14 after 1000", "b decoded 14 after 1000"]
    # One more prompt of each than is counted.
    assert log.read_text().splitlines() == 3 * once + 2 * steps
    for entry in entries:
        (reading,) = entry.party.readings
        found = (reading.prompt, reading.decode, reading.copy)
        assert [spread and spread.count for spread in found] == [2, 2 * 12, 3 + 2]
        assert reading.copy == Spread(2.0, 2.0, 2.0, 5)
    log.unlink()
    _measure(entries, 2500, rounds=1)
    pieces = [f"{name} read {tokens}" for tokens in (1000, 2000, 2500) for name in "ab"]
    steps = ["a decoded 14 after 2500", "b decoded 14 after 2500"]
    assert log.read_text().splitlines() == pieces + steps


def test_who_is_too_slow_or_dies_stops_nobody_else(tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = _entry("slow", log, patience=0.2, slow=0.3)
    dead = _entry("dead", log, dies=True)
    good = _entry("good", log)
    for tokens in (2500, 5000):
        _measure([slow, dead, good], tokens, rounds=1)
    stopped = [[each.stopped for each in entry.party.readings] for entry in (slow, dead, good)]
    assert stopped[0] == ["1,000 tokens took 0 s", "stopped at 2,500: 1,000 tokens took 0 s"]
    assert stopped[1] == ["its process died of SIGSEGV", "stopped at 2,500: its process died of "
                          "SIGSEGV"]  # fmt: skip
    assert stopped[2] == ["", ""]
    assert all(reading.decode for reading in good.party.readings)
    assert log.read_text().count("slow") == 1  # later it is not even opened


def test_what_will_take_too_long_is_not_begun(tmp_path: Path) -> None:
    """A token costs at least what it cost with less before it."""
    entry = _entry("slow", tmp_path / "log", patience=1.0, slow=0.15)
    _measure([entry], 2500, rounds=1)
    _measure([entry], 9000, rounds=1)
    assert entry.party.readings[1].stopped.startswith("it would read for more than 2 s")


def test_a_bundle_may_not_fail(tmp_path: Path) -> None:
    with pytest.raises(PotexportError, match="a cannot be measured: its process died of SIGSEGV"):
        _measure([_entry("a", tmp_path / "log", patience=None, dies=True)], 1000)
