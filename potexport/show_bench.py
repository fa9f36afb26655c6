"""What `bench` prints for people."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text

from potexport.bench import Costs
from potexport.show import print_parts, size

Cell = Callable[[Costs], str]


def costs(found: list[Costs]) -> None:
    """A column for each bundle; speeds with their ratio to the first's."""
    names = [f"{each.bundle}\n{each.runtime}, {each.precision}" for each in found]
    table = Table("", *names)

    def row(title: str, text: Cell) -> None:
        table.add_row(title, *(Text(text(each)) for each in found))

    for name in ("prefill", "decode"):
        row(f"{name}, tokens/s", _speed(name, found))
    for name in ("observe", "compress"):
        row(f"{name}, ms", _milliseconds(name))
    row("weights", lambda c: size(c.weights))
    row("pot", lambda c: size(c.pot))
    row("to open, s", lambda c: f"{c.open_seconds:.2f}")
    row("peak memory", lambda c: "" if c.peak is None else size(c.peak))
    if any(each.read for each in found):
        _reading(row)
    print_parts([table])


def _speed(name: str, found: list[Costs]) -> Cell:
    first = found[0].tokens_per_second[name]

    def cell(costs: Costs) -> str:
        mine = costs.tokens_per_second[name]
        return f"{mine:.1f}" + (f"  {mine / first:.2f} x" if len(found) > 1 else "")

    return cell


def _milliseconds(name: str) -> Cell:
    return lambda c: f"{1e3 * c.seconds[name]:.1f}" if name in c.seconds else "none"


def _reading(row: Callable[[str, Cell], None]) -> None:
    def of(text: str) -> Cell:
        return lambda c: "" if c.read is None else text.format(r=c.read)

    row("tokens read", of("{r.tokens:,}"))
    row("compressions", of("{r.compressions}"))
    row("reading, tokens/s", of("{r.tokens_per_second:.1f}"))
    row("of it in compressions", of("{r.compress_share:.1%}"))
    row("a chunk, last tenth / first", lambda c: _over(c, "chunk"))
    row("peak, end / first compression", lambda c: _over(c, "peak"))


def _over(costs: Costs, what: str) -> str:
    if costs.read is None:
        return ""
    last, first = (getattr(costs.read, f"{when}_{what}") for when in ("last", "first"))
    return f"{last / first:.3f}" if first and last else ""
