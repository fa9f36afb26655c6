"""What the command line tells on stderr: the stages of long work, reading, and a last line.

On a terminal it moves; elsewhere it is plain lines; with `--json` it is nothing.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

if TYPE_CHECKING:
    from potexport.runtime.session import Session, Stats

EVERY = 10.0  # seconds between the lines of progress where there is no terminal
STAGES = {
    "plan": "read the configuration",
    "weights": "load the weights",
    "trace": "trace the model",
    "prefill": "graph prefill",
    "decode": "graph decode",
    "observe": "graph observe",
    "compress": "graph compress",
    "lower": "lower for the delegate",
    "statistics": "statistics of queries",
    "share": "store once what is there twice",
    "write": "write graphs and weights",
    "text": "write the tokenizer",
    "check": "read every graph back",
    "seal": "digests and manifest",
    "load": "load the bundle and the model",
}


class Stages(AbstractContextManager["Stages"]):
    """Tells the stages of long work, each with its seconds; called with a stage's name as it
    begins."""

    def __init__(self, *, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._name: str | None = None
        self._quiet, self._console = quiet, Console(stderr=True, highlight=False)
        self._live: Progress | None = None
        if self._console.is_terminal and not quiet:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._live = Progress(*columns, console=self._console, transient=True)

    def __enter__(self) -> Stages:
        if self._live:
            self._live.start()
        return self

    def __call__(self, name: str) -> None:
        self._end()
        self._name, self._started = name, perf_counter()
        if self._live:
            self._task = self._live.add_task(STAGES.get(name, name), total=None)

    def _end(self) -> None:
        if self._name is None:
            return
        seconds = self.seconds[self._name] = perf_counter() - self._started
        line = f"{STAGES.get(self._name, self._name)}: {seconds:.1f} s"
        if self._live:
            self._live.remove_task(self._task)
            self._live.console.print(f"[green]✓[/] {line}")
        elif not self._quiet:
            click.echo(line, err=True)
        self._name = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._end()
        if self._live:
            self._live.stop()


class Reading(AbstractContextManager["Reading"]):
    """Progress of reading; called with tokens read, and how many there are if that is known."""

    def __init__(self, session: Session, *, quiet: bool) -> None:
        self._session, self._quiet = session, quiet
        self._console = Console(stderr=True, highlight=False)
        self._last, self._before = perf_counter(), session.stats
        self._live: Progress | None = None
        if self._console.is_terminal and not quiet:
            line = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            columns = (SpinnerColumn(), line, BarColumn(12), TimeElapsedColumn())
            self._live = Progress(*columns, console=self._console, transient=True)
            self._task = self._live.add_task("reading", total=None)

    def __enter__(self) -> Reading:
        if self._live:
            self._live.start()
        return self

    def __call__(self, read: int, total: int | None) -> None:
        if self._live:
            line = self._line(read, total)
            self._live.update(self._task, completed=read, total=total, description=line)
        elif not self._quiet and perf_counter() - self._last >= EVERY:
            self._last = perf_counter()
            click.echo(f"reading: {self._line(read, total)}", err=True)

    def _line(self, read: int, total: int | None) -> str:
        stats, slots = self._session.stats.since(self._before), self._session.manifest.pot.slots
        # Not the session's own speed: what it was fed it has not read yet.
        speed = read / (stats.read_seconds + stats.compress_seconds)
        whole = f"/{total:,}" if total else ""
        return (
            f"{read:,}{whole} tokens, {speed:,.0f}/s, "
            f"{stats.compressions:,} compressions, {stats.fill:,}/{slots:,} slots"
        )

    def end(self) -> None:
        """What was read is read; what is printed next stands in a line of its own."""
        if self._live:
            self._live.stop()

    def __exit__(self, *_: object) -> None:
        self.end()


def note_catalyst(session: Session) -> None:
    if "mass" in session.backend.policy.needs:
        width = session.manifest.pot.catalyst_width
        click.echo(
            f"note: the question is longer than the catalyst width; its last {width} tokens score "
            "the pot (build with a larger --catalyst-width for all of them)",
            err=True,
        )


def note_loaded(session: Session, path: str) -> None:
    stats = session.stats
    click.echo(
        f"{path}: {stats.tokens_read:,} tokens were read, {stats.compressions:,} compressions",
        err=True,
    )


def note_saved(session: Session, path: Path) -> None:
    size = path.stat().st_size
    click.echo(f"{path}: {session.stats.fill:,} slots saved, {size / 1e6:,.1f} MB", err=True)


def summary(session: Session, before: Stats) -> None:
    """Of what was done since."""
    stats, slots = session.stats.since(before), session.manifest.pot.slots
    peak = peak_memory()
    click.echo(
        f"read {stats.tokens_read:,} tokens ({stats.read_speed:,.1f}/s), "
        f"{stats.compressions:,} compressions, {stats.fill:,} of {slots:,} slots filled; "
        f"generated {stats.tokens_generated:,} tokens ({stats.generate_speed:,.1f}/s)"
        + (f"; peak memory {peak / 1e6:,.0f} MB" if peak else ""),
        err=True,
    )


def peak_memory() -> int | None:
    """The most bytes that this process ever held; None where the system does not say."""
    try:  # Linux: getrusage counts what the parent held before it started this process
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
