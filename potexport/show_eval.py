"""What `eval` prints for people: a bar on stderr, tables on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from itertools import groupby
from time import perf_counter
from typing import Any

import click
from rich import progress as rich_progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from potexport.progress import EVERY
from potexport.show import print_parts

Row = Mapping[str, Any]
BARS = "▁▂▃▄▅▆▇█"


class Progress(AbstractContextManager["Progress"]):
    """Called with what is read now, how many readings are done, and of how many."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._console = quiet, Console(stderr=True, highlight=False)
        self._last = perf_counter()
        self._live: rich_progress.Progress | None = None
        if self._console.is_terminal and not quiet:
            self._live = rich_progress.Progress(
                rich_progress.SpinnerColumn(),
                rich_progress.BarColumn(16),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._task = self._live.add_task("opening the bundle", total=None)

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._live:
            self._live.update(self._task, description=what, completed=done, total=total)
        elif not self._quiet and perf_counter() - self._last >= EVERY:
            self._last = perf_counter()
            click.echo(f"{what} ({done} of {total})", err=True)

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()


def tables(found: Mapping[str, Any]) -> None:
    """A table for each task, length and whether the question was known."""
    pot = found["pot"]
    title = Text.assemble(
        (found["bundle"], "bold"),
        f": a pot of {pot['slots']:,}, {pot['keep']:,} kept, chunks of {pot['chunk']:,}",
    )
    print_parts([title])
    for task, entry in found["tasks"].items():
        for (part, mode), rows in _grouped(entry["rows"]):
            print_parts([_table(task, part, mode, rows, entry)])
    print_parts([*_costs(found["costs"]), *_sentences(found)])


def _grouped(rows: Iterable[Row]) -> Iterable[tuple[tuple[str, str], list[Row]]]:
    """By length or dataset, then by whether the question was known."""

    def key(row: Row) -> tuple[int, str, bool]:
        return row.get("length", 0), row.get("dataset", ""), row["question"] == "known"

    for (length, dataset, known), group in groupby(sorted(rows, key=key), key):
        part = f"{length:,} tokens" if length else dataset
        yield (part, "known" if known else "unknown"), list(group)


def _table(task: str, part: str, mode: str, rows: list[Row], entry: Mapping[str, Any]) -> Table:
    columns = {
        "needle": ("exact", f"{entry.get('unit')}s", "nats", "by depth", "held"),
        "hit-rate": ("hit rate", "by chance", "by layer"),
        "perplexity": ("perplexity", "nats", "nats above full", "tokens"),
    }.get(task, (rows[0].get("metric", ""), "records"))
    of = f"{rows[0]['documents']} documents"
    asked = "no question" if task == "perplexity" else f"question {mode}"
    table = Table(
        "policy",
        *columns,
        title=f"{task}, {part}, {asked}, {of}",
        title_justify="left",
        title_style="bold",
    )
    for row in rows:
        table.add_row(*map(Text, (row["policy"], *_cells(task, row))))
    return table


def _cells(task: str, row: Row) -> tuple[str, ...]:
    if task == "needle":
        depths = _bars(cell["exact"] for cell in row["cells"])
        shares = (_share(row["exact"]), _share(row["digit"]), _share(row["nats"]))
        return (*shares, depths, f"{row['held']:,.0f}")
    if task == "hit-rate":
        return _share(row["rate"]), f"{row['chance']:.2f}", _bars(row["layers"])
    if task == "perplexity":
        above = _share(row["above_full"], digits=3) if "above_full" in row else ""
        return _share(row["perplexity"], digits=1), _share(row["nats"]), above, f"{row['tokens']:,}"
    return _share(row["score"]), f"{row['records']:,}"


def _share(found: Mapping[str, float], *, digits: int = 2) -> str:
    value, low, high = (f"{found[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value}  ({low} to {high})"


def _bars(shares: Iterable[float]) -> str:
    """From the first to the last, a bar each."""
    return "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in shares)


def _costs(costs: Mapping[str, Row]) -> list[Table]:
    if not costs:
        return []
    table = Table(
        "policy", "reading, tokens/s", "compressions", "of the time", title="cost of reading",
        title_justify="left", title_style="bold",
    )  # fmt: skip
    for label, cost in costs.items():
        seconds = cost["read_seconds"] + cost["compress_seconds"]
        speed = cost["tokens"] / seconds if seconds else 0.0
        cells = (label, f"{speed:,.0f}", f"{cost['compressions']:,}", f"{cost['share']:.1%}")
        table.add_row(*map(Text, cells))
    return [table]


def _sentences(found: Mapping[str, Any]) -> list[Text]:
    lines = [f"{subject.replace('_', ' ')}: {text}" for subject, text in found["protocol"].items()]
    lines += [f"note: {text}" for text in found["notes"]]
    lines.append(f"{found['command']}  ({found['seconds']:,.0f} s)")
    return [Text("\n".join(lines))]
