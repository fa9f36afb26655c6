"""What the command line prints on stdout: tables for people, plain data for `--json`.

It decides no number.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from potexport.bundle import MANIFEST, Manifest, PolicyFacts
from potexport.progress import peak_memory
from potexport.spec import Layout, TensorSpec

if TYPE_CHECKING:
    from potexport.parity import Report
    from potexport.plan import Plan
    from potexport.runtime.session import Session, Stats, Token

PIPE_WIDTH = 160  # columns where nobody's terminal says
SHARED = ("weights", "pot", "total")  # of the memory plan; the others are graphs


def size(count: int) -> str:
    """Bytes in decimal units, three digits: 538 MB."""
    number = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 999.5 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"


def answer_json(session: Session, tokens: Iterable[Token], before: Stats) -> dict[str, object]:
    """before: of the session when it was opened; what it did since is shown."""
    stats = session.stats.since(before)
    tokens = list(tokens)
    return {
        "answer": "".join(token.text for token in tokens),
        "token_ids": [token.id for token in tokens],
        "stats": {
            **asdict(stats),
            "read_speed": stats.read_speed,
            "generate_speed": stats.generate_speed,
            "slots": session.manifest.pot.slots,
            "peak_memory": peak_memory(),
        },
    }


def folded(tensors: Iterable[TensorSpec]) -> list[str]:
    """One line for the same tensors of many layers: `mass.{0…4,6…29} float32[3,1024]`."""

    def family(tensor: TensorSpec) -> tuple[tuple[str, ...], str, tuple[int, ...]]:
        parts = ("#" if part.isdigit() else part for part in tensor.name.split("."))
        return tuple(parts), tensor.dtype, tensor.shape

    families: dict[object, list[TensorSpec]] = {}
    for tensor in tensors:
        families.setdefault(family(tensor), []).append(tensor)
    lines = []
    for first, *rest in families.values():
        shown = str(first)
        if rest:
            layers = _ranges([_layer(first), *map(_layer, rest)])
            shown = shown.replace(f".{_layer(first)}", f".{{{layers}}}", 1)
        lines.append(shown)
    return lines


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 4 -> 0…2,4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}…{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _layer(tensor: TensorSpec) -> int:
    return next((int(part) for part in tensor.name.split(".") if part.isdigit()), -1)


def _pairs(title: str, rows: Mapping[str, object]) -> Text:
    return _lines(title, ((name, str(value)) for name, value in rows.items()))


def _lines(title: str, rows: Iterable[tuple[str, str]]) -> Text:
    rows = list(rows)
    wide = max((len(name) for name, _ in rows), default=0)
    body = "".join(f"\n  {name.ljust(wide)}  {value}" for name, value in rows)
    return Text.assemble((title, "bold"), body)


def _geometry(layout: Layout, policy: str, precision: str, target: str) -> list[Text]:
    facts, pot = asdict(layout.facts), asdict(layout.pot)
    pot["layer_slots"] = ", ".join(map(str, layout.pot.layer_slots)) or "all the same"
    pot["windows"] = _windows(layout)
    rules = {"policy": policy, "needs": ", ".join(sorted(layout.gathered)) or "nothing"}
    return [
        _pairs("Model", {name.replace("_", " "): value for name, value in facts.items()}),
        _pairs("Pot", {name.replace("_", " "): value for name, value in pot.items()}),
        _pairs("Rules", {**rules, "precision": precision, "target": target}),
    ]


def _windows(layout: Layout) -> str:
    """Which layers see only the last tokens, and how many slots they have."""
    same: dict[tuple[int, int], list[int]] = {}
    for layer in layout.windowed:
        size = layout.pot.window_of(layer), layout.pot.slots_of(layer)
        same.setdefault(size, []).append(layer)
    told = (
        f"layers {_ranges(layers)} see {window} tokens and hold {slots}"
        for (window, slots), layers in same.items()
    )
    return "; ".join(told) or "none"


def _graphs(layout: Layout) -> list[Text]:
    return [
        _lines(
            f"Graph {name}",
            [
                *(("in", line) for line in folded(graph.inputs)),
                *(("out", line) for line in folded(graph.outputs)),
            ],
        )
        for name, graph in layout.graphs().items()
    ]


def _memory(weights: int, layout: Layout) -> dict[str, int]:
    parts = {"weights": weights, **layout.memory()}
    return {**parts, "total": sum(parts.values())}


def _memory_lines(memory: Mapping[str, int]) -> Text:
    rows = {n if n in SHARED else f"buffers of {n}": size(count) for n, count in memory.items()}
    return _pairs("Memory of a session (and about 100 MB of program)", rows)


def _settings(name: str, settings: Mapping[str, object]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in settings.items())])


def _policies(policies: Iterable[PolicyFacts]) -> str:
    return "; ".join(
        ("" if each.label == each.name else f"{each.label}: ") + _settings(each.name, each.settings)
        for each in policies
    )


def print_parts(parts: Iterable[Table | Text]) -> None:
    out = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    for part in parts:
        out.print(part, soft_wrap=isinstance(part, Text))
        out.print()


def plan(decided: Plan) -> None:
    policy = _policies(facts for facts, _ in decided.policies)
    files = {"weights.safetensors": f"about {size(decided.weight_bytes)}"}
    if decided.target.delegate:
        files = {"model.pte": files.popitem()[1]}
    else:
        files |= {f"{name}.onnx": "below 2 MB" for name in decided.layout.graphs()}
    files |= {f"*.{soc.name}*": "contexts, about as large as the weights" for soc in decided.socs}
    print_parts(
        [
            *_geometry(decided.layout, policy, decided.precision, decided.target.name),
            *_graphs(decided.layout),
            _pairs("Files, with the tokenizer's as they are", files),
            _memory_lines(_memory(decided.weight_bytes, decided.layout)),
        ]
    )


def plan_json(decided: Plan) -> dict[str, object]:
    layout = decided.layout
    return {
        "source": str(decided.source),
        "target": decided.target.name,
        "precision": decided.precision,
        "opset": decided.options.opset,
        "model": asdict(layout.facts),
        "pot": asdict(layout.pot),
        "policies": [asdict(facts) for facts, _ in decided.policies],
        "graphs": {name: graph.to_json() for name, graph in layout.graphs().items()},
        "files": {"weights.safetensors": decided.weight_bytes},
        "memory": _memory(decided.weight_bytes, layout),
    }


def built_json(
    output: Path, manifest: Manifest, seconds: float, stages: Mapping[str, float]
) -> dict[str, object]:
    return {
        "bundle": str(output),
        "bytes": sum(file.size for file in manifest.files.values()),
        "files": {name: file.size for name, file in manifest.files.items()},
        "npu": [asdict(npu) for npu in manifest.npu],
        "seconds": round(seconds, 3),
        "stages": {name: round(value, 3) for name, value in stages.items()},
    }


def built(output: Path, manifest: Manifest, seconds: float) -> None:
    total = sum(file.size for file in manifest.files.values())
    for part in compiled(manifest):
        print_parts([part])
    click.echo(f"{output}: {size(total)}, {manifest.pot.slots:,} slots, built in {seconds:.1f} s")
    click.echo(f'next: potexport run {shlex.quote(str(output))} "Who are you?"')


def compiled(manifest: Manifest) -> list[Table | Text]:
    """For each chip, or the delegate: what became of each graph, and what it weighs."""
    weights = manifest.files[manifest.weights].size
    shown: list[Table | Text] = []
    if manifest.program:
        delegate = manifest.program.delegate
        methods = Table("method", f"operators that {delegate} takes", "in pieces")
        for name, method in manifest.program.methods.items():
            share = f"{method.delegated} of {method.operators}"
            methods.add_row(name, share, str(method.pieces))
        shown.append(methods)
    for npu in manifest.npu:
        table = Table("graph", "nodes, all on the HTP", "compiled in", "compiler's memory")
        for name, context in npu.contexts.items():
            nodes, took = str(sum(context.nodes.values())), f"{context.seconds:.1f} s"
            table.add_row(name, nodes, took, size(context.peak_memory))
        total = sum(context.bytes for context in npu.contexts.values())
        where = "NPU" if npu.compress_on == "npu" else "CPU"
        gate = "" if npu.gate is None else f" (its emulator kept {npu.gate:.1%} of the CPU's slots)"
        summary = (
            f"{npu.soc}, {npu.chip}: {size(total)} of contexts that share their weights, "
            f"{total / weights:.2f} x {manifest.weights}; compressions on the {where}{gate}"
        )
        shown += [table, Text(summary)]
    return shown


def bundle(folder: Path, manifest: Manifest) -> None:
    policy = _policies(manifest.policies)
    files = {name: size(facts.size) for name, facts in manifest.files.items()}
    weights = manifest.files[manifest.weights].size
    print_parts(
        [
            _pairs(str(folder), {"source": manifest.source, "catalyst": repr(manifest.catalyst)}),
            *_geometry(manifest.layout, policy, manifest.precision, manifest.target),
            *_graphs(manifest.layout),
            _pairs("Files", {**files, MANIFEST: size((folder / MANIFEST).stat().st_size)}),
            _memory_lines(_memory(weights, manifest.layout)),
            *compiled(manifest),
            _pairs("Built with", manifest.tools),
        ]
    )


def bundle_json(manifest: Manifest) -> dict[str, object]:
    document: dict[str, object] = json.loads(manifest.to_json())
    return {**document, "memory": _memory(manifest.files[manifest.weights].size, manifest.layout)}


def report(found: Report) -> None:
    table = Table("", "check", "measured", "tolerance", "against")
    for check in found.checks:
        mark = Text("✓", "green") if check.passed else Text("✗", "red")
        cells = (check.name, _number(check.measured), _number(check.tolerance), check.detail)
        table.add_row(mark, *map(Text, cells))
    print_parts([table, *map(Text, found.notes)])


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def targets(found: Iterable[Mapping[str, Any]]) -> None:
    table = Table("target", "--runtime", "runs on", "chips (--soc)", "precisions", "state", "how")
    for target in found:
        chips = ", ".join(soc["name"] for soc in target["socs"]) or "any"
        precisions = ", ".join(target["precisions"])
        runtime = target["runtime"].partition("-")[0]
        cells = (target["name"], runtime, target["summary"], chips, precisions)
        table.add_row(*map(Text, (*cells, target["state"], target["note"])))
    print_parts([table])
