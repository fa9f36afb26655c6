"""A server under load for as long as asked: 32 clients at once and as many faults, again and again.

Prints the server's memory over time. A clock looks at it, not the end of a round: within one it
moves by a tenth and more, with what is asked at once. Ends with 1 if an answer was wrong, the
server said that it failed, or its mean memory of the last tenth of the time is not within 2% of
that of the first, after a warm-up of another tenth. Bounded by time and by the number of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from click.testing import CliRunner

from potexport.runtime.session import Session
from tests import tiny
from tests.load import Tally, crowd, scripts
from tests.serving import Running, serving

ROOT = Path(__file__).parents[2]
CLIENTS = FAULTS = 32
POT = {"pot": 48, "chunk": 8, "keep": 24, "catalyst-width": 8, "sink": 2, "recent": 4}
MOST = 0.02  # that memory may grow or shrink
WARM = 0.1  # of the time
EVERY = 0.5  # seconds


@dataclass(frozen=True)
class Sample:
    """seconds: since the beginning. memory: in bytes, of the server's own."""

    seconds: float
    memory: int
    answers: int


def tiny_bundle(folder: Path) -> Path:
    """A random Llama of two layers."""
    from potexport.cli import cli

    tiny.save(folder / "model", "llama-tied", vocab_size=307, num_hidden_layers=2)
    options = [text for name, value in POT.items() for text in (f"--{name}", str(value))]
    made = folder / "tiny.bundle"
    arguments = ["build", str(folder / "model"), "-o", str(made), *options]
    result = CliRunner().invoke(cli, [*arguments, "--policy", "infinipot"])
    assert result.exit_code == 0, result.stderr
    return made


@contextmanager
def watched(running: Running, tally: Tally) -> Iterator[list[Sample]]:
    """Samples, which grow meanwhile."""
    samples, over, started = list[Sample](), threading.Event(), perf_counter()

    def look() -> None:
        while not over.wait(EVERY):
            samples.append(Sample(perf_counter() - started, running.memory(), tally.right))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def soak(running: Running, bundle: Path, seconds: float, rounds: int) -> tuple[list[Sample], Tally]:
    text = (ROOT / "data" / "pride-and-prejudice.txt").read_text(encoding="utf-8")
    made = scripts(Session.open(bundle, threads=1), text[2000:8000], 32)
    tally, started, done = Tally(), perf_counter(), 0
    with watched(running, tally) as samples:
        while perf_counter() - started < seconds and done < rounds:
            asyncio.run(crowd(running.server, made, tally, clients=CLIENTS, faults=FAULTS))
            done += 1
    return samples, tally


def told(samples: list[Sample], lines: int = 20) -> None:
    print(f"{'minute':>8} {'answers':>9} {'memory, MB: least':>18} {'mean':>7} {'most':>7}")
    step = max(1, math.ceil(len(samples) / lines))
    for begin in range(0, len(samples), step):
        part = samples[begin : begin + step]
        held = [each.memory / 1e6 for each in part]
        print(
            f"{part[-1].seconds / 60:8.1f} {part[-1].answers:9,} {min(held):18.2f} "
            f"{statistics.mean(held):7.2f} {max(held):7.2f}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=100_000, help="at most so many")
    parser.add_argument("--bundle", type=Path, help="default: a tiny one, made here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = asked.bundle or tiny_bundle(Path(folder))
        options = ("--threads", 1, "--sessions", 8, "--state-gb", 0.02, "--quiet")
        with serving(bundle, *options) as running:
            samples, tally = soak(running, bundle, asked.minutes * 60, asked.rounds)
            code = running.end()
            failed = [line for line in running.lines if " at " in line]
    told(samples)
    warm = [each for each in samples if each.seconds >= WARM * samples[-1].seconds]
    tenth = max(1, len(warm) // 10)
    first, last = (
        statistics.mean(each.memory for each in part) for part in (warm[:tenth], warm[-tenth:])
    )
    print(
        f"{tally.right:,} answers right, {len(tally.wrong)} wrong; "
        f"{tally.faults.total():,} faults, {len(failed)} failures of the server; memory "
        f"{100 * (last / first - 1):+.2f}% from the first tenth to the last, after a warm-up of "
        f"{100 * WARM:.0f}%"
    )
    for line in [*tally.wrong, *failed][:10]:
        print(line, file=sys.stderr)
    well = not tally.wrong and not failed and code == 0 and abs(last / first - 1) <= MOST
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
