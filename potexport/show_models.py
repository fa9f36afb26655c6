"""What `models` prints: families, what was proven of each and where, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from potexport.show import print_parts

FACTS = Path(__file__).with_name("families.json")


def found() -> dict[str, Any]:
    """What the tests measured (`make models`). tools: name -> version. proven: of each family its
    `type` in transformers, `models`, what it has `beside` Llama, and of "onnxruntime" and
    "executorch" how far logits were off while the context `fits` and `past` the pot, as shares of
    the largest; of the "npu" the largest `error` of a layer on the emulator, and nodes `refused`.
    refused: `type` and `why`."""
    document: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    return document


def models(facts: dict[str, Any]) -> None:
    table = Table("type", "models", "beside what Llama has", "ONNX Runtime", "ExecuTorch", "NPU")
    for each in facts["proven"]:
        off = (f"{each[name]['past']:.0e}" for name in ("onnxruntime", "executorch"))
        npu = f"{each['npu']['error']:.1%}" if each.get("npu") else "not run"
        table.add_row(*map(Text, (each["type"], each["models"], each["beside"], *off, npu)))
    refused = Table("refused", "why")
    for each in facts["refused"]:
        refused.add_row(Text(each["type"]), Text(each["why"]))
    tools = ", ".join(f"{name} {version}" for name, version in facts["tools"].items())
    note = (
        "Tiny random models of each family, past 15 compressions: the same slots as an independent "
        "reference, and logits, keys and values off by so much of the largest; on the NPU's "
        f"emulator the largest error of a layer. Others are tried when they are built. {tools}."
    )
    print_parts([table, refused, Text(note)])
