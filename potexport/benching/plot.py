"""Memory, and time a token, against tokens read: bundles beside peers, as one SVG.

The same figures give the same file: no date in it, and names of parts that do not change.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potexport.errors import PotexportError

# The first for bundles. Told apart without colour, too (Okabe and Ito's).
COLOURS = ("#0072b2", "#009e73", "#56b4e9", "#d55e00", "#e69f00", "#cc79a7", "#7f7f7f")
MARKS = "osDv^<>"
SETTINGS: Any = {"svg.hashsalt": "potexport", "svg.fonttype": "path", "font.size": 9.0}
SIZE = (9.2, 3.9)  # inches

Series = list[tuple[float, float]]


def require() -> None:
    """PotexportError if there is nothing to draw with; before anything is measured for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PotexportError(
            "drawing needs matplotlib; install it with: pip install 'potexport[bench]'"
        )


def draw(document: Mapping[str, Any], path: Path) -> None:
    """The JSON of `figures.Figures`, drawn; all of the file or, on any failure, none of it."""
    require()
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    parties = sorted(document["parties"], key=lambda each: each["kind"] != "bundle")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with matplotlib.rc_context(SETTINGS):
        figure, (memory, time) = pyplot.subplots(1, 2, figsize=SIZE, layout="constrained")
        for number, party in enumerate(parties):
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKS[number % len(MARKS)],
                "markersize": 4,
                "linewidth": 2.0 if party["kind"] == "bundle" else 1.2,
                "linestyle": "-" if party["kind"] == "bundle" else "--",
                "label": _label(party),
            }
            memory.plot(*_columns(peaks(party)), **look)
            time.plot(*_columns(steps(party)), **look)
        _axes(memory, "peak memory, MB")
        _axes(time, "time of one generated token, ms")
        figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        try:
            figure.savefig(partial, format="svg", metadata={"Date": None})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
            pyplot.close(figure)


def peaks(party: Mapping[str, Any]) -> Series:
    """(tokens read, MB), each of a process opened for as many; then of the long reading."""
    found = [(each["tokens"], each["peak"] / 1e6) for each in party["readings"] if each["peak"]]
    return found + _end(party, "last_peak", 1e-6)


def steps(party: Mapping[str, Any]) -> Series:
    """(tokens read, ms)."""
    return [
        (each["tokens"], 1e3 * each["decode"]["median"])
        for each in party["readings"]
        if each["decode"]
    ]


def _end(party: Mapping[str, Any], key: str, factor: float) -> Series:
    long = party["long"]
    return [(long["tokens"], long[key] * factor)] if long and long[key] else []


def _label(party: Mapping[str, Any]) -> str:
    name, precision = party["name"], party["precision"]
    return str(name if precision in name else f"{name}, {precision}")


def _columns(series: Series) -> tuple[list[float], list[float]]:
    return [tokens for tokens, _ in series], [value for _, value in series]


def _axes(axes: Any, title: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title)
    axes.set_xlabel("tokens read")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_minor_formatter(lambda value, _: _some(value))
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.grid(which="both", alpha=0.25, linewidth=0.5)


def _some(value: float) -> str:
    """Of the marks between powers of ten, 2 and 5 are named."""
    return f"{value:,.0f}" if f"{value:e}"[0] in "25" else ""
