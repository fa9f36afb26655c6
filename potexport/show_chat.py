"""What `/pot` prints: a line of facts, then the text that most heads still hold, gaps shown."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from potexport.kept_text import MOST, Piece
from potexport.talking import Kept


def kept(found: Kept) -> None:
    """On stderr: stdout has the answers alone."""
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    out.print(Text(_line(found)))
    if not found.pieces:
        return
    heads = f"{MOST:.0%} of the heads"
    out.print(Text(f"what at least {heads} hold, and how many tokens they do not:", "dim"))
    if found.facts["unknown"]:
        out.print(Text(f"({found.facts['unknown']:,} slots hold what was loaded)", "dim"))
    out.print(_text(found.pieces))


def _line(found: Kept) -> str:
    facts = found.facts
    return (
        f"{facts['fill']:,} of {facts['slots']:,} slots filled, {facts['pinned']:,} pinned; "
        f"{facts['length']:,} tokens, {facts['compressions']:,} compressions to {facts['keep']}; "
        f"position {facts['position']:,} of {facts['positions']:,}; policy {facts['policy']}"
    )


def _text(pieces: Iterable[Piece]) -> Text:
    shown = Text()
    for piece in pieces:
        if piece.held:
            shown.append(piece.text)
        else:
            shown.append(f" […{piece.tokens:,}] ", "dim")
    return shown
