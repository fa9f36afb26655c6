"""What `bench` prints for people."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from potexport.benching.figures import Figures, Party, Reading, Spread
from potexport.show import print_parts, size

Cell = Callable[[Party], str]


def tables(found: Figures) -> None:
    """What each costs; then a table for each amount of text read."""
    readings = [reading.tokens for reading in found.parties[0].readings]
    parts = [_of_all(found), *(_at(found, tokens) for tokens in readings)]
    if any(party.long for party in found.parties):
        parts.append(_long(found))
    print_parts([*parts, *_notes(found)])


def write(path: Path, document: Mapping[str, Any]) -> None:
    """All of it or, on any failure, none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def add_to(path: Path, key: str, found: object) -> None:
    """Put what was measured besides into a file that `write` wrote."""
    write(path, {**json.loads(path.read_text(encoding="utf-8")), key: found})


def _table(title: str, parties: list[Party]) -> tuple[Table, Callable[[str, Cell], None]]:
    """A column for each party."""
    names = [f"{each.name}\n{each.version}\n{each.precision}" for each in parties]
    table = Table(title, *names)

    def row(name: str, cell: Cell) -> None:
        table.add_row(name, *(Text(cell(each)) for each in parties))

    return table, row


def _of_all(found: Figures) -> Table:
    table, row = _table("", found.parties)
    row("weights", lambda p: size(p.size))
    row("read by a generated token", lambda p: "" if p.weights is None else size(p.weights))
    row("pot, or cache of 1,000 tokens", lambda p: size(p.pot or 1000 * p.cache))
    row("its own builder, s", lambda p: "" if p.build is None else f"{p.build:.1f}")
    for name in ("prefill", "decode", "observe", "compress"):
        row(f"graph {name}, ms", lambda p, name=name: _ms(p.graphs.get(name)))  # type: ignore[misc]
    return table


def _at(found: Figures, tokens: int) -> Table:
    table, row = _table(f"{tokens:,} tokens read", found.parties)

    def of(cell: Callable[[Party, Reading], str]) -> Cell:
        def shown(party: Party) -> str:
            reading = party.at(tokens)
            return cell(party, reading) if reading else ""

        return shown

    def speed(what: str, count: int) -> Callable[[Party, Reading], str]:
        first = found.parties[0].at(tokens)
        base = getattr(first, what) if first else None

        def cell(_: Party, reading: Reading) -> str:
            mine: Spread | None = getattr(reading, what)
            if mine is None:
                return ""
            ratio = f"  {base.median / mine.median:.2f} x" if base else ""
            return f"{count / mine.median:,.1f}{ratio}"

        return cell

    row("prefill, tokens/s", of(speed("prompt", tokens)))
    row("  quartiles", of(lambda _, r: _quartiles(r.prompt, tokens)))
    row("decode, tokens/s", of(speed("decode", 1)))
    row("  quartiles", of(lambda _, r: _quartiles(r.decode, 1)))
    row("first token, s", of(lambda _, r: f"{r.prompt.median:.2f}" if r.prompt else ""))
    row("of it in compressions", of(lambda _, r: _percent(r.compressing)))
    row("decode, of copying", of(lambda p, r: _percent(p.bandwidth_share(r))))
    row("prefill, of products", of(lambda p, r: _percent(p.products_share(r))))
    row("to open, s", of(lambda _, r: f"{r.open.median:.2f}" if r.open else ""))
    row("peak memory", of(lambda _, r: "" if r.peak is None else size(r.peak)))
    return table


def _long(found: Figures) -> Table:
    table, row = _table("one long reading", [each for each in found.parties if each.long])

    def of(text: str) -> Cell:
        return lambda party: text.format(r=party.long)

    row("tokens read", of("{r.tokens:,}"))
    row("compressions", of("{r.compressions:,}"))
    row("reading, tokens/s", of("{r.tokens_per_second:.1f}"))
    row("of it in compressions", of("{r.compressing:.1%}"))
    row("a token, end / beginning", of("{r.slower:.3f}"))
    row("peak, end / beginning", lambda p: _growth(p))
    return table


def _notes(found: Figures) -> list[Text]:
    copied = size(found.yardsticks["copied_bytes"])
    lines = [
        f"This machine, {found.threads} threads: copies {found.copy.median / 1e9:.1f} GB/s (arrays "
        f"of {copied}), multiplies {found.products.median / 1e9:.0f} GFLOP/s (float32)."
    ]
    lines += [f"{name} is left out: {why}" for name, why in found.left_out.items()]
    for party in found.parties:
        if party.note:
            lines.append(f"{party.name}: {party.note}.")
        for reading in party.readings:
            if reading.stopped:
                lines.append(f"{party.name} at {reading.tokens:,} tokens: {reading.stopped}.")
    return [Text("\n".join(lines))]


def _growth(party: Party) -> str:
    long = party.long
    if long is None or not (long.first_peak and long.last_peak):
        return ""
    return f"{long.last_peak / long.first_peak:.3f}"


def _ms(spread: Spread | None) -> str:
    return f"{1e3 * spread.median:.1f}" if spread else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _quartiles(spread: Spread | None, count: int) -> str:
    """Of a speed, from seconds."""
    if spread is None or spread.count < 2:
        return ""
    return f"{count / spread.high:,.1f} – {count / spread.low:,.1f}"
