"""`python -m potexport.runtime.selftest BUNDLE`: does this bundle run right on this device?

It fills the pot with random tokens and generates some; then it reads past two compressions and
generates again, and holds what happened against the contract. Where the bundle runs on the NPU and
on the CPU, the second run takes the first one's tokens and the two are compared as far as both have
read the same: logits until the pot is full, slots at the first compression. Needs what the runtime
needs, and nothing of the toolchain.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from potexport import bundle
from potexport.errors import PotexportError
from potexport.geometry import PotGeometry
from potexport.runtime.backend import Array
from potexport.runtime.session import Session

COMPRESSIONS = 2
NEW_TOKENS = 16
# Two processors must agree on this share of the first compression's slots, and their logits on this
# cosine. Near ties go either way in fp16, so likeliest tokens are counted and not required.
SAME_SLOTS, COSINE = 0.98, 0.999


@dataclass(frozen=True)
class Check:
    """One claim: what was found, what was expected."""

    name: str
    passed: bool
    found: str


@dataclass
class Run:
    """What one processor did. Speeds are in tokens per second.

    logits: S x (V,) float32, of a context that was never compressed; best: the likeliest token of
    each. steps: generated behind the long read; finite: all logits of both were.
    early: compressions of that context, which needs none.
    kept: C x (L, Hkv, keep) int32, slots, of the long read; fill: before each of these.
    """

    backend: str
    read: int
    fill_after: int
    kept: list[Array] = field(default_factory=list)
    fill: list[int] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    early: int = 0
    steps: int = 0
    finite: bool = True
    read_speed: float = 0.0
    generate_speed: float = 0.0

    @property
    def best(self) -> list[int]:
        return [int(each.argmax()) for each in self.logits]


@dataclass(frozen=True)
class Report:
    """All of a self-test. peak_memory: bytes, of the process; None where the system is silent.

    skipped: why a processor was left out, where the test was free to choose.
    """

    bundle: str
    checks: tuple[Check, ...]
    skipped: str | None
    speeds: dict[str, dict[str, float]]
    peak_memory: int | None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def selftest(folder: str | Path, *, backend: str = "auto", tokens: int | None = None) -> Report:
    """Test a bundle here.

    Args:
        backend: "cpu", "npu", or "auto": both where both run, and compare them.
        tokens: how many to read; enough for two compressions by default.

    Raises PotexportError if the bundle is damaged, or cannot run on what was asked for.
    """
    manifest = bundle.read(folder)
    count = tokens or needed(manifest.pot)
    ids = np.random.default_rng(0).integers(0, manifest.model.vocab_size, count).astype(np.int32)
    runs: list[Run] = []
    skipped: str | None = None
    for name in ["npu", "cpu"] if backend == "auto" else [backend]:
        try:
            session = _open(folder, name, check=not runs)
        except PotexportError as error:
            if name == backend or name == "cpu":
                raise
            skipped = f"{name}: not tested: {error}"
            continue
        runs.append(run(session, ids, name, forced=runs[0].best if runs else None))
        session.backend.close()  # type: ignore[attr-defined]  # two might not fit the device
    checks = [check for each in runs for check in contract(each, manifest.pot)]
    if len(runs) > 1:
        checks += compare(*runs)
    speeds = {r.backend: {"read": r.read_speed, "generate": r.generate_speed} for r in runs}
    return Report(str(folder), tuple(checks), skipped, speeds, _peak_memory())


def _open(folder: str | Path, backend: str, *, check: bool) -> Session:
    """The one place that knows how a processor is chosen."""
    return Session.open(folder, backend=backend, check=check)


def needed(pot: PotGeometry) -> int:
    """Tokens that lead to COMPRESSIONS compressions, and a few chunks more."""
    return pot.slots + COMPRESSIONS * (pot.slots - pot.keep) + 2 * pot.chunk


def run(session: Session, ids: Array, name: str, *, forced: Sequence[int] | None = None) -> Run:
    """Read `ids`, (n,) int32, then NEW_TOKENS steps: greedily, or along `forced`."""
    made = Run(name, ids.size, 0)
    inner = session.backend

    def watch(kept: list[Array]) -> None:
        made.kept.append(np.stack(kept).copy())

    # The fill before a compression is gone when `on_compress` hears of it.
    compress = inner.compress

    def noting(keep: int, *, reset: bool = True) -> list[Array]:
        made.fill.append(inner.pot.fill)
        return compress(keep, reset=reset)

    session.on_compress = watch
    inner.compress = noting  # type: ignore[method-assign]
    session.feed(ids[: max(1, inner.pot.slots - NEW_TOKENS)])
    made.logits = [each.copy() for each in _generate(session, made, forced)]
    made.early = len(made.kept)
    made.kept, made.fill = [], []
    session.reset()
    session.feed(ids)
    made.steps = sum(1 for _ in _generate(session, made, None))
    stats = session.stats
    made.fill_after = stats.fill
    made.read_speed, made.generate_speed = stats.read_speed, stats.generate_speed
    return made


def _generate(session: Session, made: Run, forced: Sequence[int] | None) -> Iterator[Array]:
    """The logits of each step; tokens are the likeliest ones, or `forced`."""
    for step in range(NEW_TOKENS if forced is None else len(forced)):
        logits = session.logits()
        made.finite = made.finite and bool(np.isfinite(logits).all())
        yield logits
        if not made.finite:
            return  # there is no novelty to go on with
        session.accept(int(logits.argmax()) if forced is None else forced[step])


def expected(pot: PotGeometry, read: int, steps: int) -> tuple[list[int], int]:
    """What the contract's loop must do: the fill before each compression, and at the end."""
    fills, fill, waiting = [], 0, read
    widths = []
    while waiting > pot.chunk:
        widths.append(pot.chunk)
        waiting -= pot.chunk
    widths += [waiting - 1] if waiting > 1 else []
    for width in widths + [1] * steps:
        if fill + width > pot.slots:
            fills.append(fill)
            fill = pot.keep
        fill += width
    return fills, fill


def contract(run: Run, pot: PotGeometry) -> list[Check]:
    """One run against what every run must do."""
    fills, fill = expected(pot, run.read, run.steps)
    found = f"{run.fill} slots before each compression, {run.fill_after} at the end"
    right = (run.fill, run.fill_after, run.early) == (fills, fill, 0)
    if not right:
        found += f"; expected {fills} and {fill}, and no compression while all fits: {run.early}"
    slots = sum(kept.size for kept in run.kept)
    wrong = sum(_wrong(kept, before, pot) for kept, before in zip(run.kept, run.fill, strict=True))
    what = f"{wrong} of {slots:,} kept slots in {len(run.kept)} compressions wrong"
    say = f"{run.backend}: "
    return [
        Check(f"{say}logits are finite", run.finite, f"over {len(run.logits) + run.steps} steps"),
        Check(f"{say}the pot fills as it must", right, found),
        Check(f"{say}kept slots ascend, sinks and recent among them", not wrong, what),
    ]


def _wrong(kept: Array, fill: int, pot: PotGeometry) -> int:
    """How many of the kept slots (L, Hkv, keep) break a rule, in all heads."""
    descents = int((np.diff(kept, axis=-1) <= 0).sum())
    outside = int(((kept < 0) | (kept >= fill)).sum())
    forced: npt.NDArray[Any] = np.r_[0 : pot.sink, fill - pot.recent : fill]
    rows = kept.reshape(-1, kept.shape[-1])
    missing = sum(int(np.setdiff1d(forced, row).size) for row in rows)
    return descents + outside + missing


def compare(one: Run, other: Run) -> list[Check]:
    """Two processors over the same tokens; `other` took those that `one` generated."""
    name = f"{one.backend} and {other.backend}: "
    pairs = list(zip(one.logits, other.logits, strict=False))
    cosine = min(_cosine(a, b) for a, b in pairs)
    same = sum(a == b for a, b in zip(one.best, other.best, strict=False)) / len(pairs)
    found = f"cosine {cosine:.6f} at least; {same:.1%} of likeliest tokens the same"
    checks = [Check(f"{name}logits agree", cosine >= COSINE, found)]
    if one.kept and other.kept:
        # From the first slot that differs, the two read different contexts.
        shares = [_shared(a, b) for a, b in zip(one.kept, other.kept, strict=False)]
        found = f"{shares[0]:.2%} at the first compression"
        if len(shares) > 1:
            found += f", then {', '.join(f'{share:.2%}' for share in shares[1:])}"
        checks.append(Check(f"{name}kept slots agree", shares[0] >= SAME_SLOTS, found))
    return checks


def _cosine(one: Array, other: Array) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _shared(one: Array, other: Array) -> float:
    """The share of kept slots (L, Hkv, keep) that both have, head by head."""
    if one.shape != other.shape:
        return 0.0
    width = one.shape[-1]
    rows = zip(one.reshape(-1, width), other.reshape(-1, width), strict=True)
    return sum(int(np.intersect1d(a, b).size) for a, b in rows) / one.size


def _peak_memory() -> int | None:
    """The most bytes that this process ever held, where Linux (so Android) tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(each.split()[1]) * 1024 for each in lines if each.startswith("VmHWM:")), None)


def lines(report: Report) -> list[str]:
    """The report for a person."""
    shown = [f"{'ok' if c.passed else 'FAILED':6} {c.name}: {c.found}" for c in report.checks]
    shown += [report.skipped] if report.skipped else []
    for name, speed in report.speeds.items():
        shown.append(
            f"{name}: read {speed['read']:,.1f} tokens/s, generated {speed['generate']:,.1f}/s"
        )
    if report.peak_memory:
        shown.append(f"peak memory {report.peak_memory / 1e6:,.0f} MB")
    return [*shown, "passed" if report.passed else "FAILED"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m potexport.runtime.selftest", description=__doc__
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=("auto", "cpu", "npu"), default="auto")
    parser.add_argument(
        "--tokens", type=int, help="to read; enough for two compressions by default"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    given = parser.parse_args(arguments)
    try:
        report = selftest(given.bundle, backend=given.backend, tokens=given.tokens)
    except PotexportError as error:
        print(f"potexport: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.to_json()) if given.json else "\n".join(lines(report)))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
