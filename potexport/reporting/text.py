"""What the page shows of one text: its tokens, and the policies' maps and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from potexport.bundle import Manifest
from potexport.reporting import costs, maps
from potexport.reporting.ledger import Lives, packed, width
from potexport.reporting.svg import picture, tag
from potexport.reporting.trace import Told, Trace

SQUARE = 9.0  # of one head of one layer


@dataclass(frozen=True)
class Answer:
    """marked: what the policy holds of the marked words."""

    policy: str
    said: str
    marked: str


def view(trace: Trace, manifest: Manifest) -> dict[str, Any]:
    """What the template asks for."""
    first = trace.told[0].lives
    steps = maps.levels(len(first.gone))
    return {
        "intro": _intro(trace, manifest),
        "costs_intro": costs.intro(trace),
        "plots": costs.plots(trace),
        "answers": [Answer(t.policy, t.answer, _of_marked(t.lives, trace)) for t in trace.told],
        "maps_intro": (
            "The text from left to right, time downwards: before any compression, after each, and "
            "at the end. The darker (by night: the brighter), the more heads hold that part."
            + (" Triangles stand over the marked words." if any(trace.marked) else "")
        ),
        "maps": [
            (t.policy, maps.survival(t.lives, trace.marked, label=t.policy)) for t in trace.told
        ],
        "steps": first.steps,
        "now": f"at the end of the text, as {trace.told[0].policy} holds it",
        "legend": maps.legend(len(first.gone)),
        "tokens": [
            (piece, f"c{steps[count]}{_kind(trace, i)}")
            for i, (piece, count) in enumerate(
                zip(trace.pieces, first.counts(first.steps - 1), strict=True)
            )
        ],
        "grid": _grid(first.heads),
        "layers": len(first.heads),
        "marked": any(trace.marked),
        "data": {
            "heads": list(first.heads),
            "levels": steps,
            "map": {"top": maps.TOP, "height": maps.TALL},
            "policies": [_data(told) for told in trace.told],
        },
    }


def _data(told: Told) -> dict[str, Any]:
    gone = told.lives.gone
    return {
        "label": told.policy,
        "read": list(told.lives.read),
        "wide": width(gone),
        "gone": packed(gone),
    }


def _kind(trace: Trace, token: int) -> str:
    if trace.marked[token]:
        return " m"
    inside = trace.head <= token < len(trace.pieces) - trace.tail
    return "" if inside else " f"


def _intro(trace: Trace, manifest: Manifest) -> str:
    asked, heads = trace.asked, len(trace.told[0].lives.gone)
    if asked.question is None:
        question = "No question is asked: none is known while reading."
    else:
        how = (
            "known while reading: it scores the pot, for policies that attend to one"
            if asked.known
            else "unknown while reading: the bundle's own instruction scores the pot, for policies "
            "that attend to one"
        )
        question = f"The question behind it is {how}: “{asked.question}”"
        if asked.known and any(told.cut for told in trace.told):
            question += f" Its last {manifest.pot.catalyst_width} tokens score."
    layers = len(manifest.layout.chosen)
    return (
        f"{trace.name}, {len(trace.pieces):,} tokens with the chat's frame. Each token is shaded "
        f"by how many of the {heads} heads, in {layers} layers, still hold it: "
        f"every head keeps its own. {question}"
    )


def _of_marked(lives: Lives, trace: Trace) -> str:
    if not any(trace.marked):
        return ""
    counts = lives.counts(lives.steps - 1)[list(trace.marked)]
    return f"marked words: held by {counts.mean():.0f} of {len(lives.gone)} heads on average"


def _grid(heads: tuple[int, ...]) -> Markup:
    """A square for each head, a column for each layer, in the order of `Lives`."""
    side = SQUARE - 2
    squares = [
        tag("rect", x=SQUARE * layer + 0.5, y=SQUARE * head + 0.5, width=side, height=side)
        for layer, count in enumerate(heads)
        for head in range(count)
    ]
    wide, tall = SQUARE * len(heads), SQUARE * max(heads)
    label = "Which heads of which layers hold the token"
    return picture(wide, tall, label, *squares, class_="heads", width=wide)
