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
| compiled here | the target's compiler took the model graphs whole; nothing here can run them |
| not here | what compiles for it is not on this machine; nothing is known but what the code says |
"""


def page(targets: list[dict[str, Any]]) -> str:
    """The page, in Markdown."""
    lines = [
        "# What runs where",
        "",
        "Generated from `potexport targets --json` (`make docs`): what this project's tests do on",
        "an x86-64 Linux machine with no phone attached.",
        STATES,
        "| target | `--runtime` | runs on | precisions | state | how |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets:
        precisions = ", ".join(target["precisions"])
        name = f"`{target['name']}`"
        runs = (target["runtime"].partition("-")[0], target["summary"], precisions)
        cells = (name, *runs, target["proven"], target["note"])
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Chips", ""]
    lines += [
        "| `--soc` | chip | target | `--runtime` | HTP | QNN's number |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets:
        for soc in target["socs"]:
            runtime = target["runtime"].partition("-")[0]
            chip = (f"`{soc['name']}`", soc["chip"], f"`{target['name']}`", runtime)
            numbers = (f"v{soc['htp_arch']}", str(soc["soc_model"]))
            lines.append(f"| {' | '.join((*chip, *numbers))} |")
    lines += ["", "## What a build takes if nobody asks otherwise", ""]
    lines += [
        "| target | `--runtime` | precision | slots | chunk | operator set | to be installed |",
        "|---|---|---|---|---|---|---|",
    ]
    for target in targets:
        extra = (
            f"`potexport[export,{target['extra']}]`" if target["extra"] else "`potexport[export]`"
        )
        cells = (
            f"`{target['name']}`",
            target["runtime"].partition("-")[0],
            target["default_precision"],
            str(target["slots"] or "an eighth of the model's context, 512 to 2,048"),
            str(target["chunk"] or 64),
            "" if target["delegate"] else f"{target['lowest_opset']} to 23",
            extra,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page(json.load(sys.stdin)))
