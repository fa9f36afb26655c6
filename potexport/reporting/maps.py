"""Drawings of a text: its tokens' colours, and where in it the held ones come from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from potexport.reporting.charts import LEVELS
from potexport.reporting.ledger import Array, Lives
from potexport.reporting.svg import picture, tag

COLUMNS, WIDE, TALL = 150, 300.0, 132.0  # of a map: bins, and its size with
TOP = 10.0  # above it for the marks


def levels(heads: int) -> list[int]:
    """By how many heads hold a token, 0 to `heads`: its step of the colour scale.

    By the square root, so that one head of many is still seen; only none is 0.
    """
    return [math.ceil(LEVELS * math.sqrt(n / heads) - 1e-9) for n in range(heads + 1)]


def legend(heads: int) -> list[tuple[int, str]]:
    """(step of the scale, the counts that it stands for), the empty ones left out."""
    found: dict[int, list[int]] = {}
    for count, step in enumerate(levels(heads)):
        found.setdefault(step, []).append(count)
    return [
        (step, f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}–{counts[-1]}")
        for step, counts in found.items()
    ]


def survival(lives: Lives, marked: Sequence[bool], *, label: str) -> Markup:
    """Text from left to right, compressions downwards: the mean share of heads that hold the tokens
    of each small part of the text."""
    edges = np.linspace(0, lives.tokens, min(COLUMNS, lives.tokens) + 1).astype(int)
    cell, row = WIDE / (len(edges) - 1), (TALL - TOP) / lives.steps
    paths: dict[int, list[str]] = {}
    for step in range(lives.steps):
        y = TOP + row * step
        for first, last, level in _runs(_parts(lives, step, edges)):
            paths.setdefault(level, []).append(
                f"M{_n(first * cell)} {_n(y)}h{_n((last - first) * cell)}v{_n(row)}"
                f"h-{_n((last - first) * cell)}z"
            )
    drawn = [
        tag("path", d="".join(paths[level]), class_=f"held c{level}")
        for level in sorted(paths)
        if level
    ]
    frame = tag("rect", x=0, y=TOP, width=WIDE, height=TALL - TOP, class_="frame")
    ticks = [
        tag("path", d=f"M{_n(x - 3)} 1h6l-3 7z", class_="needle") for x in _places(marked, WIDE)
    ]
    now = tag("rect", x=0, y=TOP, width=WIDE, height=row, class_="now")
    told = f"{label}: which parts of the text its heads hold, after each compression"
    return picture(
        WIDE, TALL, told, tag("title", told), frame, *drawn, *ticks, now, class_="survival"
    )


def _parts(lives: Lives, step: int, edges: Array) -> list[int]:
    """The level of each part of the text."""
    counts = np.concatenate([[0], np.cumsum(lives.counts(step))])
    sizes = np.maximum(np.diff(edges), 1)
    shares = (counts[edges[1:]] - counts[edges[:-1]]) / sizes / max(len(lives.gone), 1)
    return [math.ceil(LEVELS * math.sqrt(share) - 1e-9) for share in shares]


def _runs(values: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first, one past the last, value) of each run of the same value."""
    found: list[tuple[int, int, int]] = []
    for i, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], i + 1, value)
        else:
            found.append((i, i + 1, value))
    return found


def _places(marked: Sequence[bool], wide: float) -> list[float]:
    """The middle of each run of marked tokens."""
    return [
        wide * (first + last) / 2 / len(marked)
        for first, last, on in _runs([int(m) for m in marked])
        if on
    ]


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
