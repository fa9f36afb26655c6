"""`potexport targets --json | python tools/what_runs_where.py > docs/targets.md`: the page "what
runs where". A test compares the page with what this prints."""

from __future__ import annotations

import json
import sys
from typing import Any

STATES = """
| state | what it means |
|---|---|
| executed here | the graphs and the loop ran where they were built, and equal PyTorch |
| compiled here | the target's own compiler took every node; nothing here can run the result |
| exported only | the graphs are written in the target's format, and nothing more is known |
"""


def page(targets: dict[str, dict[str, Any]]) -> str:
    """The page, in Markdown."""
    lines = [
        "# What runs where",
        "",
        "Generated from `potexport targets --json` (`make docs`): what this project's tests do on",
        "an x86-64 Linux machine with no phone attached.",
        STATES,
        "| target | runs on | precisions | state | how |",
        "|---|---|---|---|---|",
    ]
    for name, target in targets.items():
        precisions = ", ".join(target["precisions"])
        cells = (f"`{name}`", target["summary"], precisions, target["proven"], target["note"])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Chips", "", "| `--soc` | chip | target | HTP | QNN's number |"]
    lines.append("|---|---|---|---|---|")
    for name, target in targets.items():
        for soc in target["socs"]:
            arch = f"v{soc['htp_arch']}"
            lines.append(
                f"| `{soc['name']}` | {soc['chip']} | `{name}` | {arch} | {soc['soc_model']} |"
            )
    lines += ["", "## What a build takes if nobody asks otherwise", ""]
    lines += [
        "| target | precision | slots | chunk | operator set | to be installed |",
        "|---|---|---|---|---|---|",
    ]
    for name, target in targets.items():
        extra = (
            f"`potexport[export,{target['extra']}]`" if target["extra"] else "`potexport[export]`"
        )
        cells = (
            f"`{name}`",
            target["default_precision"],
            str(target["slots"] or "an eighth of the model's context, 512 to 2,048"),
            str(target["chunk"] or 64),
            f"{target['lowest_opset']} to 23",
            extra,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(json.load(sys.stdin)))
