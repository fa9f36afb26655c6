"""A server under load for as long as asked: 32 clients at once and as many faults, again and again.

Prints the server's memory over time. Ends with 1 if an answer was wrong, the server said that it
failed, or its memory at the end is not within 2% of what it was after the first tenth of the time.
Bounded by time and by the number of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
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


def soak(running: Running, bundle: Path, seconds: float, rounds: int) -> tuple[list[Sample], Tally]:
    text = (ROOT / "data" / "pride-and-prejudice.txt").read_text(encoding="utf-8")
    made = scripts(Session.open(bundle, threads=1), text[2000:8000], 32)
    tally, samples, started = Tally(), list[Sample](), perf_counter()
    while (passed := perf_counter() - started) < seconds and len(samples) < rounds:
        asyncio.run(crowd(running.server, made, tally, clients=CLIENTS, faults=FAULTS))
        samples.append(Sample(passed, running.memory(), tally.right))
    return samples, tally


def told(samples: list[Sample], lines: int = 20) -> None:
    print(f"{'minute':>8} {'answers':>9} {'memory, MB':>11}")
    step = max(1, len(samples) // lines)
    for each in [*samples[::step], samples[-1]]:
        print(f"{each.seconds / 60:8.1f} {each.answers:9,} {each.memory / 1e6:11.2f}")


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
        statistics.median(each.memory for each in part) for part in (warm[:tenth], warm[-tenth:])
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
