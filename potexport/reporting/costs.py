"""Plots of what reading cost, against tokens read: memory, and the time of each chunk."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from markupsafe import Markup

from potexport.reporting.charts import Series, plot
from potexport.reporting.trace import Chunk, Told, Trace
from potexport.show import size

MOST_TIMES = 9  # plots of times, one a policy
USUAL = 0.9  # of all chunks; slower ones may leave the plot


@dataclass(frozen=True)
class Plot:
    title: str
    drawn: Markup
    note: str


def intro(trace: Trace) -> str:
    return (
        f"While the text below was read. The pot takes {size(trace.pot_bytes)} whatever its "
        f"length; a cache of every token takes {size(round(trace.token_bytes))} more for each "
        "token (computed, in the pot's own precision)."
    )


def plots(trace: Trace) -> list[Plot]:
    return [_cache(trace), *_peak(trace), *_times(trace)]


def _cache(trace: Trace) -> Plot:
    title, total = "Memory of keys and values", len(trace.pieces)
    full = trace.token_bytes * total
    series = [
        Series("the pot", "solid", [(0, trace.pot_bytes), (total, trace.pot_bytes)]),
        Series("a cache of every token, computed", "dashed", [(0, 0), (total, full)]),
    ]
    drawn = plot(series, title=title, unit="bytes", shown=_bytes)
    return Plot(title, drawn, f"At {total:,} tokens: {full / trace.pot_bytes:.1f} × the pot.")


def _peak(trace: Trace) -> list[Plot]:
    """Of the first reading: a process's peak never falls again."""
    peaks = [(chunk.read, float(chunk.peak)) for chunk in trace.told[0].chunks if chunk.peak]
    if not peaks:
        return []
    title, rest = "Peak memory of the process", peaks[0][1] - trace.pot_bytes
    series = [
        Series("measured", "solid", peaks),
        Series(
            "with a cache of every token, computed",
            "dashed",
            [(at, rest + trace.token_bytes * at) for at, _ in peaks],
        ),
    ]
    drawn = plot(series, title=title, unit="bytes", shown=_bytes)
    ratio = peaks[-1][1] / peaks[0][1]
    note = f"With weights and program. At the end {ratio:.3f} × what it was after the first chunk."
    return [Plot(title, drawn, note)]


def _times(trace: Trace) -> list[Plot]:
    """Milliseconds of each chunk, all policies on one scale."""
    told = [each for each in trace.told if each.chunks][:MOST_TIMES]
    times = sorted(1e3 * max(c.read_seconds, c.compress_seconds) for t in told for c in t.chunks)
    if not times:
        return []
    usual = times[int(USUAL * (len(times) - 1))]
    return [_time(each, min(times[-1], 2 * usual)) for each in told]


def _time(told: Told, top: float) -> Plot:
    title = f"Time of a chunk, {told.policy}"
    reading = [(c.read, 1e3 * c.read_seconds) for c in told.chunks]
    pressing = [(c.read, 1e3 * c.compress_seconds) for c in told.chunks if c.compress_seconds]
    series = [
        Series("reading", "dots", reading),
        Series("compressing", "marks", pressing),
    ]
    drawn = plot(series, title=title, unit="milliseconds", shown=_milliseconds, top=top)
    beyond = sum(value > top for _, value in (*reading, *pressing))
    note = f" {beyond} slower at the upper edge." if beyond else ""
    return Plot(title, drawn, _flat(told.chunks) + note)


def _flat(chunks: tuple[Chunk, ...]) -> str:
    """The share of compressions; and is the end as the beginning?"""
    begin = next((i for i, chunk in enumerate(chunks) if chunk.compress_seconds), len(chunks))
    after = [chunk.read_seconds for chunk in chunks[begin:]]
    total = sum(chunk.read_seconds + chunk.compress_seconds for chunk in chunks)
    share = sum(chunk.compress_seconds for chunk in chunks) / total
    said = f"{share:.1%} of the time in compressions."
    if len(after) < 10:
        return said
    tenth = len(after) // 10
    ratio = mean(after[-tenth:]) / mean(after[:tenth])
    return f"{said} Last tenth of the chunks against the first: {ratio:.2f} ×."


def _bytes(value: float) -> str:
    return size(round(value)) if value else "0"


def _milliseconds(value: float) -> str:
    return f"{value:g} ms"
