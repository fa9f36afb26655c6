"""Kills builds and saves at random moments: `make kills`.

python -m tests.fuzz.kills --builds 200 --saves 200

A process is forked that has imported everything and opened what it needs, and is killed with
SIGKILL after a random time within what the work takes, until so many were ended at their work.
Then there is the old bundle (or state), or the new one, whole; and what was left beside it is gone
after the next one.
"""

from __future__ import annotations

import argparse
import os
import random
import select
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

from potexport import bundle
from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.runtime.saved import read_session
from potexport.runtime.session import Session


def forked(work: Callable[[], object]) -> tuple[int, int]:
    """The process that does it, and a pipe with a byte as it begins, and one when done."""
    tells, told = os.pipe()
    process = os.fork()
    if not process:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 2)
        with suppress(BaseException):
            os.write(told, b"(")
            work()
            os.write(told, b")")
            os._exit(0)
        os._exit(1)
    os.close(told)
    os.read(tells, 1)
    return process, tells


def ended(process: int, tells: int) -> bool:
    """Whether it came to the end of its work; RuntimeError if that failed by itself."""
    _, status = os.waitpid(process, 0)
    done = os.read(tells, 1) == b")"
    os.close(tells)
    if not os.WIFSIGNALED(status) and not done:
        raise RuntimeError("the work failed by itself")
    return done


def killed(work: Callable[[], object], within: float, chance: random.Random) -> bool:
    """Start it, and kill it after up to `within` seconds; whether it was still at it."""
    process, tells = forked(work)
    # Half of the time near the end, where names change.
    time.sleep(within * (chance.random() if chance.random() < 0.5 else chance.uniform(0.85, 1.0)))
    os.kill(process, signal.SIGKILL)
    return not ended(process, tells)


def lasts(work: Callable[[], object]) -> float:
    """Seconds of the work alone, without the process it is done in: the median of five."""
    took = []
    for _ in range(5):
        process, tells = forked(work)
        started = time.monotonic()
        select.select([tells], [], [])
        took.append(time.monotonic() - started)
        ended(process, tells)
    return median(took)


def attempts(times: int, counts: Counter[str]) -> Iterator[int]:
    """Numbers, until so many were killed; RuntimeError if that does not come about."""
    for number in count():
        if counts["killed"] >= times:
            return
        if number > 20 + 5 * times:
            raise RuntimeError(f"too few were ended at their work: {dict(counts)}")
        yield number


def beside(path: Path) -> list[Path]:
    """What stands beside it, and belongs to it."""
    return sorted(path.parent.glob(f".{path.name}.*"))


def whole(folder: Path) -> str:
    """What tells one complete bundle from another; PotexportError if it is none."""
    manifest = bundle.read(folder)
    bundle.check_files(folder, manifest)
    names = {path.name for path in folder.iterdir()}
    if names != {*manifest.files, bundle.MANIFEST}:
        raise PotexportError(f"{folder} holds {sorted(names)}")
    return manifest.catalyst


def kill_builds(make: Callable[[str], object], output: Path, times: int, seed: int) -> Counter[str]:
    """make: builds a bundle there, in place of an older one, with this catalyst.

    Until so many were ended at their work; those that were done first count as nothing.
    """
    chance, counts = random.Random(seed), Counter[str]()
    within = lasts(lambda: make("the first"))
    known = whole(output)
    for number in attempts(times, counts):
        was_killed = killed(partial(make, f"number {number}"), within * 1.05, chance)
        found = whole(output)
        assert found in (known, f"number {number}"), (found, known)
        counts["killed" if was_killed else "done"] += 1
        counts["new" if found != known else "old"] += 1
        known = found
        left = beside(output)
        counts["left"] += len(left)
        assert len(left) <= 1, left
        if number % 20 == 19:
            print(f"{number + 1} builds: {dict(counts)}", flush=True)
    ended(*forked(lambda: make("the last")))
    assert whole(output) == "the last"
    assert not beside(output)
    return counts


def kill_saves(session: Session, path: Path, times: int, seed: int) -> Counter[str]:
    """The session's own state is saved again and again, each time with another number in it."""
    chance, counts = random.Random(seed), Counter[str]()
    manifest: Manifest = session.manifest

    def save(number: int) -> None:
        session.note = str(number)
        session.save(path)

    within = lasts(lambda: save(-1))
    known = -1
    for number in attempts(times, counts):
        was_killed = killed(partial(save, number), within * 1.05, chance)
        _, settings = read_session(path, manifest, session.backend.pot)
        assert int(settings.note) in (known, number), (settings.note, known)
        counts["killed" if was_killed else "done"] += 1
        counts["new" if int(settings.note) != known else "old"] += 1
        known = int(settings.note)
        left = beside(path)
        counts["left"] += len(left)
        assert len(left) <= 1, left
    save(-2)
    assert not beside(path)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--builds", type=int, default=200)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as room:
        folder = Path(room)
        from tests.fuzz.builds import builder

        output = folder / "tiny.bundle"
        make = builder(folder / "model", output)
        counts = kill_builds(make, output, asked.builds, asked.seed)
        print(f"builds: {dict(counts)}: always one whole bundle", flush=True)
        session = Session.open(output, threads=1)
        session.feed("The fox said: 13 sheep and 42 goats.")
        counts = kill_saves(session, folder / "a.pot", asked.saves, asked.seed)
        print(f"saves: {dict(counts)}: always one whole state", flush=True)


if __name__ == "__main__":
    main()
