"""What `coverage` and `push` print on stdout. It decides no number, as `show` does not."""

from __future__ import annotations

from collections.abc import Sequence

import click
from rich.table import Table
from rich.text import Text

from potexport.coverage import FLOOR, FP16_MAX, JUMP, Coverage, Depth, Placement, Seen
from potexport.push import Pushed
from potexport.show import print_parts, size

RULE = (
    f"✗ marks the first value that is not finite, or whose error is above {FLOOR:g} and more than "
    f"{JUMP:g} times the largest before it. error: |HTP - fp32| / |fp32|, over the whole tensor. "
    "new rows: the same, of a layer's new keys or values, whichever is larger."
)


def coverage(found: Coverage) -> None:
    parts: list[Table | Text] = [
        Text(f"{found.bundle} on {found.soc}", "bold"),
        _summary(found),
        Text("What nodes became, in QNN's words", "bold"),
        _operators(found.placements),
    ]
    for depth in found.depths:
        parts += _depth(depth)
    if found.depths:
        parts += [Text(RULE), Text("\n").join(map(_verdict, found.depths))]
    print_parts(parts)


def _summary(found: Coverage) -> Table:
    table = Table("graph", "nodes", "rewritten to", "taken", "refused", "compiled in")
    for each in found.placements:
        refused = ", ".join(f"{kind} {name}" for name, kind in each.refused)
        numbers = (sum(each.written.values()), each.taken + len(each.refused), each.taken)
        mark = Text(refused, "red") if refused else Text("none")
        table.add_row(each.graph, *map(str, numbers), mark, f"{each.seconds:.1f} s")
    return table


def _operators(placements: Sequence[Placement]) -> Table:
    """A line for each operator: nodes in each graph, and what one of them became."""
    table = Table("operator", *(each.graph for each in placements), "one node became")
    for operator in sorted({name for each in placements for name in each.became}):
        counts = [sum(each.became.get(operator, {}).values()) for each in placements]
        kinds = {kind for each in placements for kind in each.became.get(operator, {})}
        shown = [kind for kind in sorted(kinds) if kind]
        shown += ["nothing of its own"] if "" in kinds else []
        table.add_row(operator, *(str(n or "") for n in counts), ", or ".join(shown))
    for kind in sorted({kind for each in placements for kind in each.added}):
        counts = [each.added.get(kind, 0) for each in placements]
        table.add_row("", *(str(n or "") for n in counts), f"{kind}, added by the compiler")
    return table


def _depth(depth: Depth) -> list[Table | Text]:
    what = f"{depth.tokens} token{'s' if depth.tokens > 1 else ''} over {depth.fill} filled slots"
    parts: list[Table | Text] = [
        Text(f"Graph {depth.graph} behind each layer: {what}", "bold"),
        _seen(depth.layers, depth.broken, depth.rows),
    ]
    if depth.inside and depth.broken is not None:
        parts.append(Text(f"Graph {depth.graph} inside {depth.layers[depth.broken].part}", "bold"))
        parts.append(_seen(depth.inside, depth.broken_inside))
    return parts


def _seen(values: Sequence[Seen], broken: int | None, rows: Sequence[float] = ()) -> Table:
    more = ("new rows",) if rows else ()
    table = Table("", "value", "error", "cosine", "largest", "of fp16's", *more)
    for place, each in enumerate(values):
        value = "" if each.value == each.part else f" {each.value}"
        part = f"{each.part} ({each.operator}{value})" if each.operator else each.part
        cells = [
            f"{each.error:.1e}" if each.finite else "not finite",
            f"{each.cosine:.6f}" if each.finite else "",
            f"{each.largest:.4g}",
            f"{each.largest / FP16_MAX:.2%}",
        ]
        if rows:
            cells.append(f"{rows[place]:.1e}" if place < len(rows) else "")
        mark = Text("✗", "red") if place == broken else Text("")
        table.add_row(mark, *map(Text, (part, *cells)), style="red" if place == broken else "")
    return table


def _verdict(depth: Depth) -> Text:
    if depth.broken is None:
        worst = max(depth.layers, key=lambda each: each.error)
        loud = max(depth.layers, key=lambda each: each.largest)
        return Text(
            f"{depth.graph}: the error jumps nowhere; it is largest at {worst.part} "
            f"({worst.error:.1e}). The largest value is {loud.largest:.4g}, at {loud.part}."
        )
    where = depth.layers[depth.broken].part
    if depth.broken_inside is None:
        return Text(f"{depth.graph}: the error jumps first at {where}", "red")
    first = depth.inside[depth.broken_inside]
    return Text(
        f"{depth.graph}: the error jumps first in {where}, {first.part}: {first.operator} "
        f"{first.value}",
        "red",
    )


def pushed(done: Pushed) -> None:
    click.echo(
        f"{done.place} on {done.serial}: {len(done.copied)} files copied, {size(done.bytes)}"
    )
    report, table = done.selftest, Table("", "check", "found")
    for check in report["checks"]:
        mark = Text("✓", "green") if check["passed"] else Text("✗", "red")
        table.add_row(mark, *map(Text, (check["name"], check["found"])))
    print_parts([table])
    if report["skipped"]:
        click.echo(report["skipped"])
    for name, speed in report["speeds"].items():
        click.echo(
            f"{name}: read {speed['read']:,.1f} tokens/s, generated {speed['generate']:,.1f}/s"
        )
    if report["peak_memory"]:
        click.echo(f"peak memory {size(report['peak_memory'])}")
