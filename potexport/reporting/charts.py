"""Drawings of measurements: intervals, needles by depth and length, costs against tokens read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from potexport.reporting.evals import Cell, Estimate
from potexport.reporting.svg import Scale, picture, tag, ticks

LEVELS = 10  # of the page's colour scale, c1 to c10; c0 is nothing
LINE, HEIGHT = 124.0, 12.0  # of one interval
BIN, ROW = 33.0, 24.0  # of one cell of a needle map
WIDE, TALL = 340.0, 200.0  # of a plot, and its margins:
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 40.0, 34.0

Format = Callable[[float], str]


def intervals(
    estimates: Mapping[str, Estimate], *, label: str, ends: tuple[float, float]
) -> Markup:
    """One line for each figure, below each other: a dot with its whiskers. ends: of the axis."""
    x = Scale(*ends, 5.0, LINE - 5.0)
    height = HEIGHT * len(estimates)
    told = "; ".join(
        f"{name} {e.value:.2f} ({e.low:.2f} to {e.high:.2f})" for name, e in estimates.items()
    )
    grid = [
        tag("line", x1=at, x2=at, y1=0, y2=height, class_="grid")
        for at in (x(ends[0]), x((ends[0] + ends[1]) / 2), x(ends[1]))
    ]
    lines = []
    for number, each in enumerate(estimates.values()):
        y, kind = HEIGHT * (number + 0.5), f"i{number}"
        low, high, value = (
            x(min(max(v, ends[0]), ends[1])) for v in (each.low, each.high, each.value)
        )
        lines += [
            tag("line", x1=low, x2=high, y1=y, y2=y, class_=f"whisker {kind}"),
            tag("circle", cx=value, cy=y, r=3.5, class_=f"dot {kind}"),
        ]
    said = f"{label}: {told}"
    return picture(LINE, height, said, tag("title", said), *grid, *lines, class_="intervals")


def needles(rows: Mapping[int | str, Sequence[Cell]], figure: str, *, label: str) -> Markup:
    """The share of needles found, by depth from left to right, a row for each length."""
    bins = max((round(1 / cell.width) for cells in rows.values() for cell in cells), default=1)
    gutter = 46.0
    drawn: list[Markup] = []
    for number, (length, cells) in enumerate(rows.items()):
        y, name = ROW * number, _column(length)
        middle = y + ROW / 2 + 4
        drawn.append(tag("text", name, x=gutter - 7, y=middle, text_anchor="end", class_="axis"))
        by_bin = {int(cell.depth * bins): cell for cell in cells}
        for i in range(bins):
            drawn.append(_cell(by_bin.get(i), figure, gutter + BIN * i, y, f"{label}, {name}"))
    height = ROW * len(rows)
    return picture(gutter + BIN * bins, height, f"{label}: {figure}", *drawn, class_="needles")


def _cell(cell: Cell | None, figure: str, x: float, y: float, label: str) -> Markup:
    if cell is None:
        told = f"{label}: no needle at this depth"
        box = tag("rect", x=x + 1, y=y + 1, width=BIN - 2, height=ROW - 2, rx=2, class_="none")
        return tag("g", tag("title", told), box)
    value = cell.figures[figure]
    number = level(value)
    told = f"{label} tokens, depth {cell.depth:.0%}: {value:.2f} {figure}, {cell.count} needles"
    box = tag(
        "rect", x=x + 1, y=y + 1, width=BIN - 2, height=ROW - 2, rx=2, class_=f"cell c{number}"
    )
    text = tag(
        "text", f"{value:.2f}", x=x + BIN / 2, y=y + ROW / 2 + 4, text_anchor="middle",
        class_=f"value c{number}",
    )  # fmt: skip
    return tag("g", tag("title", told), box, text)


def level(share: float) -> int:
    """A share, 0 to 1, as a step of the colour scale; only nothing is 0."""
    return 0 if share <= 0 else min(LEVELS, 1 + int(share * (LEVELS - 1) + 0.5))


def _column(name: int | str) -> str:
    return f"{name:,}" if isinstance(name, int) else name


@dataclass(frozen=True)
class Series:
    """points: (tokens read, value). look: solid, dashed, dots or marks."""

    name: str
    look: str
    points: Sequence[tuple[float, float]]


def plot(
    series: Sequence[Series], *, title: str, unit: str, shown: Format, top: float | None = None
) -> Markup:
    """Lines and dots against tokens read; the axes begin at 0. top: the highest value to show."""
    most = max((v for each in series for _, v in each.points), default=1.0) if top is None else top
    last = max((t for each in series for t, _ in each.points), default=1.0)
    up, along = ticks(most), [t for t in ticks(last) if t <= last]
    x = Scale(0.0, last, LEFT, WIDE - RIGHT)
    y = Scale(0.0, up[-1], TALL - BOTTOM, TOP)
    parts = [tag("title", f"{title}, {unit}")]
    for value in up:
        at = y(value)
        parts += [
            tag("line", x1=LEFT, x2=WIDE - RIGHT, y1=at, y2=at, class_="grid"),
            tag("text", shown(value), x=LEFT - 6, y=at + 4, text_anchor="end", class_="axis"),
        ]
    for value in along:
        parts.append(
            tag("text", f"{value:,.0f}", x=x(value), y=TALL - BOTTOM + 16, text_anchor="middle",
                class_="axis")
        )  # fmt: skip
    parts.append(
        tag("text", "tokens read", x=WIDE - RIGHT, y=TALL - 3, text_anchor="end", class_="axis")
    )
    for number, each in enumerate(series):
        parts += [*_legend(each, number, len(series)), _drawn(each, number, x, y, shown)]
    return picture(WIDE, TALL, f"{title}, {unit}, against tokens read", *parts, class_="plot")


def _legend(each: Series, number: int, of: int) -> list[Markup]:
    """Above the plot, a line for each series, with a sample of it."""
    at = TOP - 14 - 14 * (of - 1 - number)
    points = [(LEFT, at), (LEFT + 18, at)] if each.look in ("solid", "dashed") else [(LEFT + 9, at)]
    return [
        _shape(each.look, number, points),
        tag("text", each.name, x=LEFT + 25, y=at + 4, class_="legend"),
    ]


def _drawn(each: Series, number: int, x: Scale, y: Scale, shown: Format) -> Markup:
    points = [(x(t), y(min(v, y.high))) for t, v in each.points]
    last = (
        f"{each.name}: {shown(each.points[-1][1])} at {each.points[-1][0]:,.0f} tokens"
        if points
        else each.name
    )
    return tag("g", tag("title", last), _shape(each.look, number, points))


def _shape(look: str, number: int, points: Sequence[tuple[float, float]]) -> Markup:
    if look in ("solid", "dashed"):
        steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        return tag("polyline", points=steps, class_=f"line {look} s{number}")
    draw = _disc if look == "dots" else _diamond
    return tag("path", d="".join(draw(x, y) for x, y in points), class_=f"mark s{number}")


def _disc(x: float, y: float) -> str:
    return f"M{x - 2:.1f} {y:.1f}a2 2 0 1 0 4 0a2 2 0 1 0 -4 0"


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f} {y - 3:.1f}l3 3l-3 3l-3 -3z"
