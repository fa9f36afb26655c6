"""Tables of a measurement: every policy at equal memory, between what bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from markupsafe import Markup

from potexport.reporting import charts, evals
from potexport.reporting.evals import FIGURES, Estimate, Row, Task

# Above and below the policies, whether measured or not: what they are held against.
CEILINGS, FLOORS = ("full", "oracle"), ("random", "truncation")
SAID = {
    "full": "full cache",
    "exact": "exact",
    "digit": "per digit",
    "nats": "nats",
    "rate": "hit rate",
    "perplexity": "perplexity",
    "score": "score",
}
LESS_IS_BETTER = frozenset({"perplexity"})
MODES = {
    "unknown": "Question unknown while reading",
    "known": "Question known while reading: it scores the pot",
}
ASKS = {"unknown": "instruction", "known": "question"}
MAPPED = ("exact", "digit")
ELSEWHERE = "Maps of policies that do not attend to the question are those above."
Column = int | str


@dataclass(frozen=True)
class Cell:
    drawn: Markup
    numbers: list[str]


@dataclass(frozen=True)
class Line:
    """One policy. asks: what it attends to besides the text, if anything. cells: one a column, None
    if there is no figure."""

    policy: str
    asks: str
    cells: list[Cell | None]


@dataclass(frozen=True)
class Numbers:
    policy: str
    column: str
    numbers: list[str]
    held: str


@dataclass(frozen=True)
class Maps:
    policy: str
    drawn: list[Markup]


@dataclass(frozen=True)
class Table:
    """groups: what bounds from above, the policies from best to worst, what bounds from below."""

    heading: str
    caption: str
    keys: list[str]
    axis: str
    columns: list[str]
    ends: str  # of the axis of every cell
    groups: list[list[Line]]
    names: list[str]
    rows: list[Numbers]
    holds: bool
    map_names: list[str]
    maps: list[Maps]
    elsewhere: str  # where maps are that this table does not repeat


def table(task: Task, question: str) -> Table:
    """The rows of one task that were measured with the question known, or unknown."""
    rows = [row for row in task.rows if row.question == question]
    columns = list(dict.fromkeys(row.column for row in rows))
    figures = FIGURES[task.name]
    drawn = figures[:2]
    ends = _ends(rows, drawn)
    groups = [
        [_line(label, rows, columns, drawn, ends) for label in group]
        for group in _groups(rows, figures[0])
    ]
    order = [line.policy for group in groups for line in group]
    names = [_said(name, task) for name in figures]
    # What does not depend on the question is mapped once.
    mapped = [row for row in rows if not row.same or question == task.questions[0]]
    lengths = all(isinstance(column, int) for column in columns)
    return Table(
        heading=MODES[question],
        caption=f"{' and '.join(names[: len(drawn)]).capitalize()}, by "
        f"{'tokens of the text' if lengths else 'data set'}",
        keys=names[: len(drawn)],
        axis="tokens" if lengths else "data set",
        columns=[f"{_column(column)} tokens" if lengths else _column(column) for column in columns],
        ends=" to ".join(f"{end:.0f}" if end in (0, 1) else _number(end) for end in ends),
        groups=groups,
        names=names,
        rows=[
            Numbers(
                policy=said(row.policy),
                column=_column(row.column),
                numbers=[_interval(row.figures[name]) for name in figures],
                held="" if row.held is None else f"{row.held:,.0f}",
            )
            for row in sorted(rows, key=lambda row: order.index(said(row.policy)))
        ],
        holds=any(row.held is not None for row in rows),
        map_names=[_said(name, task) for name in MAPPED],
        maps=[_maps(name, mapped) for name in order if _cells(name, mapped)],
        elsewhere=ELSEWHERE if len(mapped) < len(rows) and task.name == "needle" else "",
    )


def said(policy: str) -> str:
    """A policy's name on the page."""
    return SAID["full"] if policy == "full" else policy


def _said(figure: str, task: Task) -> str:
    return f"per {task.unit}" if figure == "digit" else SAID[figure]


def _column(column: Column) -> str:
    return f"{column:,}" if isinstance(column, int) else column


def _ends(rows: Sequence[Row], figures: Sequence[str]) -> tuple[float, float]:
    """Of the axis that all lines of a table share: shares have 0 to 1."""
    if "perplexity" not in figures:
        return 0.0, 1.0
    found = [row.figures["perplexity"] for row in rows]
    return min(each.low for each in found), max(each.high for each in found)


def _groups(rows: Sequence[Row], figure: str) -> list[list[str]]:
    """Policies as three groups of labels."""
    labels = dict.fromkeys(row.policy for row in rows)
    scores = {
        label: mean(row.figures[figure].value for row in rows if row.policy == label)
        for label in labels
    }
    between = [label for label in labels if label not in CEILINGS and not _floor(label)]
    between.sort(key=scores.__getitem__, reverse=figure not in LESS_IS_BETTER)
    floors = [label for label in labels if _floor(label)]
    missing = [label for label in FLOORS if label not in floors]
    return [list(CEILINGS), between, [*floors, *missing]]


def _floor(label: str) -> bool:
    return label in FLOORS


def _line(
    label: str,
    rows: Sequence[Row],
    columns: Sequence[Column],
    figures: Sequence[str],
    ends: tuple[float, float],
) -> Line:
    mine = {row.column: row for row in rows if row.policy == label}
    cells = [_cell(mine.get(column), figures, ends) for column in columns]
    scored = any(row.scored for row in mine.values())
    asks = ASKS[rows[0].question] if scored else ""
    return Line(said(label), asks, cells)


def _cell(row: Row | None, figures: Sequence[str], ends: tuple[float, float]) -> Cell | None:
    if row is None:
        return None
    shown = {SAID[name]: row.figures[name] for name in figures}
    label = f"{said(row.policy)}, {_column(row.column)}"
    return Cell(
        charts.intervals(shown, label=label, ends=ends),
        [_number(each.value) for each in shown.values()],
    )


def _interval(each: Estimate) -> str:
    return f"{_number(each.value)} ({_number(each.low)} to {_number(each.high)})"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def _maps(name: str, rows: Sequence[Row]) -> Maps:
    cells = _cells(name, rows)
    return Maps(name, [charts.needles(cells, figure, label=name) for figure in MAPPED])


def _cells(name: str, rows: Sequence[Row]) -> dict[Column, Sequence[evals.Cell]]:
    return {row.column: row.cells for row in rows if said(row.policy) == name and row.cells}
