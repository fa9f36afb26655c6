"""Markdown tables of what `potexport eval --output` wrote, for docs/quality.md.

python tools/quality_tables.py EVAL.json …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def estimate(found: Row, digits: int = 2) -> str:
    low, high = (f"{found[end]:.{digits}f}" for end in ("low", "high"))
    return f"{found['value']:.{digits}f} ({low}–{high})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def needle(rows: list[Row]) -> Iterator[str]:
    for length, of_length in groupby(
        sorted(rows, key=lambda r: r["length"]), lambda r: r["length"]
    ):
        known: dict[str, dict[str, Row]] = {}
        for row in of_length:
            known.setdefault(row["policy"], {})[row["question"]] = row
        asked = [q for q in ("unknown", "known") if any(q in each for each in known.values())]
        head = ["policy", *(f"question {q}: {what}" for q in asked for what in ("exact", "digits"))]
        body = [
            [
                f"`{policy}`" if policy not in ("full", "oracle", "truncation") else policy,
                *(
                    estimate(each[q][what]) if q in each else ""
                    for q in asked
                    for what in ("exact", "digit")
                ),
            ]
            for policy, each in known.items()
        ]
        some = next(iter(next(iter(known.values())).values()))
        yield f"{length:,} tokens, {some['documents']} documents, {some['questions']} questions"
        yield table(head, body)


def others(tasks: Row) -> Iterator[str]:
    for name, what, digits in (("perplexity", "perplexity", 2), ("hit-rate", "rate", 3)):
        rows = tasks.get(name, {}).get("rows", [])
        rows = [r for r in rows if r["question"] == "unknown"] or rows
        if rows:
            yield f"{name}, question unknown, {rows[0]['length']:,} tokens"
            more = ["nats above full"] if "above_full" in rows[0] else []
            yield table(
                ["policy", what, *more],
                [
                    [f"`{r['policy']}`", estimate(r[what], digits)]
                    + (
                        [estimate(r["above_full"], 3)]
                        if more and "above_full" in r
                        else [""] * len(more)
                    )
                    for r in rows
                ],
            )


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        found = json.loads(path.read_text())
        print(f"`{found['command']}` ({found['seconds']:.0f} s)\n")
        for part in (
            *needle(found["tasks"].get("needle", {}).get("rows", [])),
            *others(found["tasks"]),
        ):
            print(part, end="\n\n")


if __name__ == "__main__":
    main()
