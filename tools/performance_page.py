"""`make bench`: from what was measured to the part of docs/performance.md between its two marks.

    python tools/performance_page.py BENCH.json [PAGE] [--long LONG.json] [--more MORE.json]

Without a page it is printed. LONG.json: another run, with a longer reading (`make bench-million`).
MORE.json: another run of some of the parties, at other amounts of text.
What was asked of each figure stands here; what was reached is the run's own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
GENAI, LLAMA = "onnxruntime-genai-int4", "llama-cpp"
MB = 1e6
Json = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """what: the row's name. asked, shown: in words. reached: None where it was not measured."""

    what: str
    asked: str
    shown: str
    reached: bool | None


class Run:
    """One run's JSON, and the parties that goals are about."""

    def __init__(self, document: Json) -> None:
        self.document = document
        self.parties: list[Json] = document["parties"]
        bundles = [each for each in self.parties if each["kind"] == "bundle"]
        self.w4 = next((each for each in bundles if _in_4_bits(each)), bundles[0])
        self.peers = {each["name"]: each for each in self.parties if each["kind"] == "peer"}

    def tokens(self) -> list[int]:
        return [reading["tokens"] for reading in self.w4["readings"]]

    def nearest(self, tokens: int) -> int | None:
        """The amount of text of this run that stands for one in a goal; None if none comes near."""
        found = min(self.tokens(), key=lambda each: abs(each - tokens))
        return found if 0.5 <= found / tokens <= 2 else None

    @staticmethod
    def at(party: Json, tokens: int) -> Json:
        found: Json = next(each for each in party["readings"] if each["tokens"] == tokens)
        return found


def _in_4_bits(row: Json) -> bool:
    """w4, or one of its kinds."""
    return str(row["precision"]).startswith("w4")


def goals(run: Run) -> Iterator[Goal]:
    """In the order in which they were asked for."""
    for asked, tokens in ((1.6, 1_000), (10.0, 32_000)):
        yield _against(run, GENAI, "decode", tokens, asked)
        yield _against(run, LLAMA, "decode", tokens, asked if tokens > 1_000 else 1.2)
    for peer in (GENAI, LLAMA):
        yield _against(run, peer, "prompt", 1_000, 1.8)
    yield from _of_the_machine(run)
    yield from _memory(run)
    yield from _beside(run)
    yield from _long(run)
    if "longer" in run.document:
        yield from _long(Run(run.document["longer"]))


def _against(run: Run, peer: str, what: str, tokens: int, asked: float) -> Goal:
    name = f"{'decode' if what == 'decode' else 'prefill'} against {peer}, {tokens:,} tokens read"
    party, found = run.peers.get(peer), run.nearest(tokens)
    if party is None or found is None:
        missing = "no reading of that length" if party else f"{peer} was not there"
        return Goal(name, f"{asked:g} ×", f"not measured: {missing}", None)
    mine, theirs = run.at(run.w4, found)[what], run.at(party, found)
    if not theirs[what]:
        why = theirs["stopped"] or "not asked for"
        return Goal(name, f"{asked:g} ×", f"not measured: {why}", None)
    ratio = theirs[what]["median"] / mine["median"]
    return Goal(name, f"{asked:g} ×", f"{ratio:.2f} ×", ratio >= asked)


def _of_the_machine(run: Run) -> Iterator[Goal]:
    share = run.at(run.w4, run.tokens()[0])["bandwidth_share"]
    if share is not None:
        what = "decode, of this machine's memory bandwidth"
        yield Goal(what, "0.7", f"{share:.2f}", share >= 0.7)
    longest = run.at(run.w4, max(run.tokens()))
    share = longest["compressing"]
    shown = f"{share:.1%}" if share else "not measured: nothing was compressed"
    reached = share <= 0.03 if share else None
    yield Goal("compressions, of the reading time", "at most 3%", shown, reached)


def _memory(run: Run) -> Iterator[Goal]:
    held = run.w4["size"] + run.w4["pot"]
    limit = 1.2 * held + 150 * MB
    peak = max(reading["peak"] or 0 for reading in run.w4["readings"])
    yield Goal(
        "peak memory of a session",
        f"at most 1.2 × (weights + pot) + 150 MB: {limit / MB:.0f} MB",
        f"{peak / MB:.0f} MB",
        peak <= limit,
    )


def _beside(run: Run) -> Iterator[Goal]:
    """What other programs of `make bench` put into the file."""
    rows = run.document.get("perplexity", [])
    mine = next(filter(_in_4_bits, rows), None)
    if mine:
        more = mine["perplexity"] / rows[0]["perplexity"] - 1
        shown = f"{more:+.1%} ({mine['perplexity']:.2f}, fp32 {rows[0]['perplexity']:.2f})"
        yield Goal("perplexity of w4 against fp32, real prose", "within 5%", shown, more <= 0.05)
    builds = run.document.get("builds", {})
    if GENAI in builds:
        ours, theirs = builds["potexport"]["median"], builds[GENAI]["median"]
        shown = f"{ours:.1f} s, theirs {theirs:.1f} s"
        yield Goal("build of a bundle against onnxruntime-genai's", "1 ×", shown, ours <= theirs)


def _long(run: Run) -> Iterator[Goal]:
    long = run.w4["long"]
    if not long:
        return
    read = f"{long['tokens']:,} tokens read"
    if long["first_peak"]:
        more = long["last_peak"] / long["first_peak"] - 1
        what = f"{read}: peak memory against the first {long['first']:,}"
        yield Goal(what, "within 2%", f"{more:+.2%}", more <= 0.02)
    more = long["slower"] - 1
    yield Goal(f"{read}: time of a token at the end", "within 5%", f"{more:+.1%}", more <= 0.05)


def page(document: Json) -> str:
    run = Run(document)
    lines = [*_machine(run), "", *_table(["", "asked", "measured", "reached"], _goal_rows(run)), ""]
    for tokens in run.tokens():
        lines += [f"### {tokens:,} tokens read", "", *_parties(run, tokens), ""]
    return "\n".join([*lines, *_notes(run)]).strip() + "\n"


def _machine(run: Run) -> Iterator[str]:
    machine, marks = run.document["machine"], run.document["yardsticks"]
    memory = f", {machine['memory'] / 2**30:.0f} GiB" if machine["memory"] else ""
    cache = marks["last_level_cache"]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}){memory}, "
        f"{machine['system']}, Python {machine['python']}; {run.document['threads']} threads each. "
        f"It copies {marks['copy']['median'] / 1e9:.1f} GB/s "
        f"({marks['copy']['low'] / 1e9:.1f} to {marks['copy']['high'] / 1e9:.1f}, arrays of "
        f"{marks['copied_bytes'] / MB:,.0f} MB"
        + (f", last-level cache {cache / MB:,.0f} MB" if cache else "")
        + f") and multiplies {marks['products']['median'] / 1e9:.0f} GFLOP/s in float32 "
        f"(numpy {marks['numpy']})."
    )


def _goal_rows(run: Run) -> Iterator[list[str]]:
    words = {True: "yes", False: "**no**", None: ""}
    for goal in goals(run):
        yield [goal.what, goal.asked, goal.shown, words[goal.reached]]


def _parties(run: Run, tokens: int) -> Iterator[str]:
    """A column for each, a row for each figure."""
    cells: list[tuple[str, Callable[[Json, Json], str]]] = [
        ("prefill, tokens/s", lambda _, r: _speed(r["prompt"], tokens)),
        ("decode, tokens/s", lambda _, r: _speed(r["decode"], 1)),
        ("first token, s", lambda _, r: f"{r['prompt']['median']:.2f}" if r["prompt"] else ""),
        ("to open, s", lambda _, r: f"{r['open']['median']:.2f}" if r["open"] else ""),
        ("peak memory, MB", lambda _, r: f"{r['peak'] / MB:,.0f}" if r["peak"] else ""),
        ("decode, of copying", lambda _, r: _percent(r["bandwidth_share"])),
        ("prefill, of products", lambda _, r: _percent(r["products_share"])),
        ("of reading in compressions", lambda _, r: _percent(r["compressing"])),
    ]
    rows = [
        [name, *(cell(party, run.at(party, tokens)) for party in run.parties)]
        for name, cell in cells
    ]
    yield from _table(["", *(f"{p['name']}, {p['precision']}" for p in run.parties)], rows)


def _notes(run: Run) -> Iterator[str]:
    versions = dict.fromkeys(party["version"] for party in run.parties)
    yield f"Versions: {', '.join(versions)}."
    for tokens in run.document.get("more", []):
        yield f"{tokens:,} tokens: a run of its own, of those that have figures."
    if "longer" in run.document:
        yield "The longest reading was a run of its own, on the same machine."
    for name, why in run.document["left_out"].items():
        yield f"{name} was left out: {why}."
    for party in run.parties:
        if party["note"]:
            yield f"{party['name']}: {party['note']}."
        for reading in party["readings"]:
            if reading["stopped"]:
                yield f"{party['name']} at {reading['tokens']:,} tokens: {reading['stopped']}."


def _speed(spread: Json | None, count: int) -> str:
    if not spread:
        return ""
    most = f" ({count / spread['high']:.0f} to {count / spread['low']:.0f})"
    return f"{count / spread['median']:.1f}" + (most if spread["count"] > 1 else "")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _table(head: list[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def add(document: Json, more: Json) -> None:
    """Put another run's readings beside those of the same parties, at texts that these lack."""
    others = {each["name"]: each["readings"] for each in more["parties"]}
    known = {each["tokens"] for each in document["parties"][0]["readings"]}
    texts = sorted({each["tokens"] for readings in others.values() for each in readings} - known)
    for party in document["parties"]:
        for tokens in texts:
            found = [r for r in others.get(party["name"], []) if r["tokens"] == tokens]
            nothing = dict.fromkeys(party["readings"][0]) | {
                "tokens": tokens,
                "stopped": "",
                "curve": [],
            }
            party["readings"] += found or [nothing]
    document["more"] = texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("page", type=Path, nargs="?")
    parser.add_argument("--long", type=Path)
    parser.add_argument("--more", type=Path)
    asked = parser.parse_args()
    document = json.loads(asked.figures.read_text(encoding="utf-8"))
    if asked.long:
        document["longer"] = json.loads(asked.long.read_text(encoding="utf-8"))
    if asked.more:
        add(document, json.loads(asked.more.read_text(encoding="utf-8")))
    made = page(document)
    if not asked.page:
        print(made)
        return
    text = asked.page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    partial = asked.page.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(f"{before}{BEGIN}\n\n{made}\n{END}{after}", encoding="utf-8")
    partial.replace(asked.page)


if __name__ == "__main__":
    main()
