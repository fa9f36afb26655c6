"""What `policies` prints: rules, sources, and what each costs."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from potexport.show import print_parts

PASSES = {
    "mass": "a pass of the catalyst",
    "window": "a pass of the last tokens, once more",
}
OUTPUTS = {
    "novelty": "the head in prefill",
    "received": "attention as an output of prefill and decode",
}
TEXTS = {"queries": "a calibration text at build"}


def summary(module: str) -> str:
    """The first line of a policy's file."""
    return (sys.modules[module].__doc__ or "").strip().partition("\n")[0]


def source(kind: type) -> str:
    """What stands behind "Source:" in its docstring, up to the first full stop or comma."""
    found = re.search(r"Source: (.+?)(?:, section|\.\s|\.$|;)", inspect.getdoc(kind) or "", re.S)
    return " ".join(found[1].split()) if found else ""


def costs(needs: Collection[str]) -> dict[str, list[str]]:
    """passes: before each compression. outputs: of every pass over the text. build: once."""
    kinds = {"passes": PASSES, "outputs": OUTPUTS, "build": TEXTS}
    return {
        kind: [text for need, text in texts.items() if need in needs]
        for kind, texts in kinds.items()
    }


def policies(found: Mapping[str, Mapping[str, Any]]) -> None:
    table = Table("policy", "keeps", "looks at", "costs besides", "settings", "source")
    for name, policy in found.items():
        paid = [text for texts in policy["costs"].values() for text in texts]
        shown = " ".join(f"{key}={value}" for key, value in policy["settings"].items())
        cells = (
            name,
            policy["summary"],
            ", ".join(policy["needs"]) or "the slot alone",
            "; ".join(paid) or "nothing",
            shown or "none",
            policy["source"],
        )
        table.add_row(*map(Text, cells))
    print_parts([table])
