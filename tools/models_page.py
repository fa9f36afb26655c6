"""`make models`: from what the tests of families measured to `potexport/families.json`, which
`potexport models` prints, and to the page docs/models.md. A test compares the page with the file.

    python tools/models_page.py [MEASURED.json]

Without an argument the page is printed, from the file.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FACTS, PAGE = ROOT / "potexport" / "families.json", ROOT / "docs" / "models.md"
TOOLS = ("torch", "transformers", "onnxruntime", "executorch", "onnxruntime-qnn")
# By the name of the tiny model (tests/tiny.py): what people know it by.
NAMES = {
    "llama": "Llama 2, SmolLM2, TinyLlama, Falcon 3",
    "llama-tied": "the same with a tied head",
    "llama-bias": "the same with biases",
    "llama3-rope": "Llama 3.1 to 3.3 (scaled RoPE)",
    "mistral": "Mistral 7B, Nemo, Small",
    "ministral": "Ministral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen 1.5, 2, 2.5",
    "qwen2-windows": "the same with sliding windows",
    "qwen3": "Qwen 3",
    "qwen3-moe": "Qwen 3 30B-A3B and other mixtures",
    "olmoe": "OLMoE",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "smollm3": "SmolLM3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (its text decoder)",
    "phi": "Phi 1, 1.5, 2",
    "phi3": "Phi 3, Phi 4",
    "phi4-mini": "Phi 4 mini (long RoPE)",
    "gpt-oss": "gpt-oss",
    "granite": "Granite 3",
    "stablelm": "StableLM 2",
    "gpt-neox": "GPT-NeoX, Pythia",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4 0414",
    "cohere": "Command R",
    "cohere2": "Command R7B, Command A",
    "falcon": "Falcon 7B",
    "falcon-gqa": "Falcon 40B, 11B",
    "starcoder2": "StarCoder 2",
    "helium": "Helium",
    "ernie4_5": "ERNIE 4.5",
    "exaone4": "EXAONE 4",
    "nemotron": "Nemotron, Minitron",
    "seed_oss": "Seed-OSS",
    "arcee": "Arcee",
    "apertus": "Apertus",
}


def facts(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What `potexport models` knows, from one record a test. Raises ValueError for records of a
    failed test, or of too few."""
    failed = [each for each in measured if not each["passed"]]
    if failed:
        raise ValueError(f"{len(failed)} tests failed; the page tells what was proven alone")
    families: dict[str, dict[str, Any]] = {}
    for each in measured:
        if "family" in each:
            found = families.setdefault(each["family"], {})
            found[each["runtime"]] = {name: each[name] for name in ("fits", "past", "compressions")}
            found |= {name: each[name] for name in ("traits", "npu") if name in each}
    without = [name for name, each in families.items() if not each.get("npu")]
    if without:
        raise ValueError(f"no figures of the NPU's emulator; install onnxruntime-qnn: {without}")
    missing = set(NAMES) ^ set(families)
    if missing:
        raise ValueError(f"expected all families and no others; these differ: {sorted(missing)}")
    proven = [
        {
            "type": families[name]["traits"].pop("type"),
            "models": known,
            "beside": beside(families[name].pop("traits")),
            **families[name],
        }
        for name, known in NAMES.items()
    ]
    refused = [
        {"type": each["refused"], "why": each["message"]} for each in measured if "refused" in each
    ]
    tools = {name: importlib.metadata.version(name) for name in TOOLS}
    return {"tools": tools, "proven": proven, "refused": refused}


def beside(traits: dict[str, Any]) -> str:
    """What a family has that Llama has not."""
    told = [
        (traits["windows"], "sliding windows"),
        (traits["tables"] > 1, "a RoPE base for each type of layer"),
        (traits["still"], "layers without RoPE"),
        (traits["turned"] < 1, "partial RoPE"),
        (traits["neighbours"], "interleaved RoPE"),
        (traits["softcap"], "soft caps"),
        (traits["sinks"], "attention sinks"),
        (traits["experts"], "mixture of experts"),
        (traits["heads"] == "one", "one key/value head"),
        (traits["heads"] == "own", "a key/value head for each query head"),
        (traits["adapter"], "an adapter file"),
    ]
    return ", ".join(text for there, text in told if there)


def page(found: dict[str, Any]) -> str:
    """docs/models.md: `models_page.md` with the tables in it."""
    lines = [
        "| type | models | beside Llama | ONNX Runtime fits | past | ExecuTorch fits | past "
        "| NPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found["proven"]:
        figures = [
            f"{each[runtime][name]:.0e}"
            for runtime in ("onnxruntime", "executorch")
            for name in ("fits", "past")
        ]
        npu = f"{each['npu']['error']:.1%}"
        cells = (f"`{each['type']}`", each["models"], each["beside"], *figures, npu)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Refused, with the words that a person reads:", "", "| type | why |", "|---|---|"]
    lines += [f"| `{each['type']}` | {each['why']} |" for each in found["refused"]]
    tools = ", ".join(f"{name} {version}" for name, version in found["tools"].items())
    lines += ["", f"Measured with {tools}."]
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return text.replace("<!-- tables -->", "\n".join(lines))


def main() -> None:
    if len(sys.argv) > 1:
        found = facts(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        text = page(found)
        FACTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(page(json.loads(FACTS.read_text(encoding="utf-8"))), end="")


if __name__ == "__main__":
    main()
