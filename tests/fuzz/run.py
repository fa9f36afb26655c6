"""Fuzzes the runtime with bundles that were changed: `make fuzz`.

python -m tests.fuzz.run [BUNDLE …] --cases 10000 --seed 0
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

POT = {"pot": 48, "chunk": 8, "keep": 24, "catalyst-width": 8, "sink": 2, "recent": 4}
# What is not asked for is as in `tests.tiny`; in place, and quantized by blocks, only the second.
SIZES = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}
MODELS: tuple[tuple[dict[str, int], list[str]], ...] = (({}, []), (SIZES, ["--precision", "w4"]))


def build(folder: Path) -> list[Path]:
    """Two tiny bundles, built by the command line in a process of its own."""
    made = []
    for number, (sizes, options) in enumerate(MODELS):
        model, bundle = folder / f"model{number}", folder / f"tiny{number}.bundle"
        program = (
            "import sys, pathlib; from tests import tiny; "
            f"tiny.save(pathlib.Path(sys.argv[1]), 'llama-tied', num_hidden_layers=2, **{sizes})"
        )
        subprocess.run([sys.executable, "-c", program, model], check=True)
        command = [
            sys.executable,
            "-m",
            "potexport",
            "build",
            str(model),
            "-o",
            str(bundle),
            *options,
        ]
        command += [text for name, size in POT.items() for text in (f"--{name}", str(size))]
        subprocess.run([*command, "--policy", "infinipot"], check=True, capture_output=True)
        made.append(bundle)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="*", type=Path, help="built here if none is given")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as room:
        given = asked.bundles or build(Path(room))

        from tests.fuzz.worker import Outcome, case, prepare

        originals = [prepare(each, Path(room) / f"original{n}") for n, each in enumerate(given)]
        started = time.monotonic()
        counts: Counter[tuple[str, str]] = Counter()
        failed: list[tuple[int, Outcome]] = []
        most = slowest = 0.0
        for seed in range(asked.seed, asked.seed + asked.cases):
            outcome = case(originals, seed)
            counts[outcome.mutation, outcome.kind] += 1
            most, slowest = max(most, outcome.growth), max(slowest, outcome.seconds)
            if outcome.failed or asked.cases == 1:
                failed += [(seed, outcome)] if outcome.failed else []
                print(f"--seed {seed}: {outcome.mutation}: {outcome.kind}: {outcome.what}")
            if outcome.failed or seed % 500 == 499:
                print(f"{seed + 1 - asked.seed} cases, {len(failed)} failed", flush=True)
        for (mutation, kind), count in sorted(counts.items()):
            print(f"{mutation:22} {kind:8} {count:6}")
        print(
            f"{asked.cases} cases from {asked.seed} in {time.monotonic() - started:.0f} s: "
            f"{len(failed)} failed; most memory {most / 2**20:.0f} MiB, most time {slowest:.1f} s"
        )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
