"""One long reading: is its end as its beginning?

A machine may be slower an hour later by itself. So the last pieces take turns with the first pieces
of a new session, and what is compared is the ratio within each pair.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from statistics import median

from potexport.benching.figures import Long, Spread
from potexport.benching.workers import Worker
from potexport.errors import PotexportError
from potexport.geometry import PotGeometry
from potexport.runtime.ids import Ids

FIRST = 10_000  # tokens, after which memory is looked at for the first time
PAIRS = 10  # pieces of the end, each with one of a new session's beginning
PIECE = 1_000  # tokens, at least


def read_long(make: Callable[[], Worker], pot: PotGeometry, ids: Ids) -> Long:
    """Read (n,) tokens with one process, and the first ones again with a second."""
    # Of whole compressions, so that each piece has as many.
    freed = pot.slots - pot.keep
    piece = freed * -(-min(PIECE, ids.size // 40) // freed)
    whole = ids.size // piece
    before = -(-pot.slots // piece) + 1  # pieces until each has its compressions
    if whole < 2 * before + 1:
        raise PotexportError(
            f"{ids.size} tokens are too few to tell the end of a reading from its beginning; read "
            f"at least {(2 * before + 1) * piece}"
        )
    pairs = min(PAIRS, whole - before)
    parts = [ids[n * piece : (n + 1) * piece] for n in range(whole)]
    first = max(before, min(FIRST // piece, whole // 10))
    curve: list[tuple[int, float]] = []
    peaks: list[tuple[int, int | None]] = []
    early: list[float] = []
    with closing(make()) as old:

        def read(number: int) -> None:
            seconds = old.ask("read", parts[number])
            curve.append(((number + 1) * piece, seconds / piece))
            peaks.append(((number + 1) * piece, old.ask("peak")))

        for number in range(whole - pairs):
            read(number)
        with closing(make()) as new:
            for number in range(before):
                new.ask("read", parts[number])
            for number in range(pairs):
                read(whole - pairs + number)
                early.append(new.ask("read", parts[before + number]) / piece)
        compressions, share = old.ask("compressions"), old.ask("compressing")
    late = [seconds for _, seconds in curve[-pairs:]]
    return Long(
        tokens=whole * piece,
        compressions=compressions,
        tokens_per_second=whole / sum(seconds for _, seconds in curve),
        compressing=share,
        first=first * piece,
        late=Spread.some(late),
        early=Spread.some(early),
        slower=median(end / begin for end, begin in zip(late, early, strict=True)),
        first_peak=peaks[first - 1][1],
        last_peak=peaks[-1][1],
        curve=curve,
        peaks=peaks,
    )
