"""Each compiled graph by itself: one run on the emulator over a pot that was filled elsewhere.

Float graphs are held against PyTorch in fp32, quantized ones against the same graph on the CPU:
what quantization costs is another question than whether the chip computes what was asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from potexport import htp
from potexport.bundle import Npu
from potexport.quantize import MIDDLE
from potexport.runtime.backend import padded
from potexport.runtime.onnxruntime_backend import CONFIG
from potexport.runtime.tensors import map_weights
from potexport.spec import EMBEDDED, QUANTIZED, GraphSpec

if TYPE_CHECKING:
    from potexport.parity import Report
    from potexport.reference import TorchBackend
    from potexport.runtime.backend import Array, Backend
    from potexport.runtime.pot import Pot
    from potexport.runtime.session import Session

Arrays = dict[str, "Array"]
# Measured on 30 layers of SmolLM2-135M and on the tests' tiny models: docs/npu.md.
COSINE = 5e-4  # 1 - cosine of any position's logits
NEAR = 0.02  # of the largest of a tensor: new keys and values, mass, novelty
DIFFER = 0.01  # share: of best tokens, of kept slots


def check(
    report: Report,
    folder: Path,
    npu: Npu,
    files: Mapping[str, Path],
    eager: Session,
    ids: Array,
    catalyst: Array,
) -> None:
    """Add a check for each graph.

    Args:
        files: unshared contexts, by graph. eager: a session over TorchBackend in fp32.
        ids: more tokens than the pot has slots. catalyst: what scores the pot.
    """
    from potexport.runtime.session import Session

    manifest, chunk = eager.manifest, eager.manifest.pot.chunk
    quantized = manifest.precision in QUANTIZED
    source = Session.open(folder, backend="cpu", check=False) if quantized else eager
    source.reset()
    source.feed(ids[: (manifest.pot.slots // chunk - 1) * chunk + 1])
    pot = source.backend.pot
    if "mass" in manifest.policy.needs and catalyst.size:
        source.backend.observe(catalyst)
    table = None if npu.embedding is None else map_weights(folder / manifest.weights)[npu.embedding]
    ahead = ids[pot.fill : pot.fill + chunk + 1]
    tokens = {"prefill": ahead[:-1], "decode": ahead[:1], "observe": catalyst}
    specs = manifest.graphs
    over = {g: inputs(specs[g], pot, tokens.get(g), ahead[1:], manifest.pot.keep) for g in files}
    made = htp.run(files, {graph: _embedded(given, table) for graph, given in over.items()})
    against = "the same graph on the CPU" if quantized else "PyTorch in fp32"
    where = f"over {pot.fill} of {manifest.pot.slots} slots, against {against}"
    for graph, outputs in made.items():
        if quantized:
            wanted = _on_cpu(folder / f"{graph}.onnx", over[graph], manifest.pot.keep)
        else:
            wanted = _in_torch(graph, source.backend, over[graph], tokens)
        _compare(report, graph, outputs, wanted, where)


def _embedded(given: Arrays, table: Array | None) -> Arrays:
    """As a context takes it: rows of the embedding for token ids, where it does."""
    if table is None or "input_ids" not in given:
        return given
    rest = {name: array for name, array in given.items() if name != "input_ids"}
    return {EMBEDDED: table[given["input_ids"]], **rest}


def inputs(spec: GraphSpec, pot: Pot, ids: Array | None, next_ids: Array, keep: int) -> Arrays:
    """What a portable graph is given."""
    per_slot = {**pot.scores, "positions": pot.positions}
    arrays: Arrays = {}
    for tensor in spec.inputs:
        array = arrays[tensor.name] = np.zeros(tensor.shape, tensor.dtype)
        kind, *rest = tensor.name.split(".")
        if kind == "past_key_values":
            array[...] = (pot.keys if rest[1] == "key" else pot.values)[int(rest[0])]
        elif kind in per_slot:
            array[...] = per_slot[kind][int(rest[0])]
        elif kind == "past_seq_len":
            array[...] = pot.fills
        elif kind == "position":
            array[...] = pot.position
        elif kind == "reset":
            array[...] = 1
        elif kind == "pinned":
            array[...] = pot.pinned
        elif kind == "keep":
            array[...] = keep
        elif kind == "next_ids":
            padded(array, next_ids)
        elif kind == "query_weights" and ids is not None:
            array[: ids.size] = 1
        elif kind == "input_ids" and ids is not None:
            padded(array, ids)
    return arrays


def _on_cpu(path: Path, given: Arrays, keep: int) -> Arrays:
    """What ONNX Runtime makes of it, every node as it is written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    made = dict(zip(names, session.run(names, given), strict=True))
    if any(name.startswith("kept.") for name in made):
        return {name: made[name][:, :keep] for name in names if name.startswith("kept.")}
    return made


def _in_torch(graph: str, backend: Backend, given: Arrays, tokens: Mapping[str, Array]) -> Arrays:
    """What PyTorch makes of the same, by the names of the contract."""
    import torch

    oracle: TorchBackend = backend  # type: ignore[assignment]
    if graph == "compress":
        before = oracle.pot.save()
        kept = oracle.compress(int(given["keep"][0]))
        oracle.pot.load(before)
        return {f"kept.{layer}": slots for layer, slots in enumerate(kept)}
    ids = tokens[graph]
    width = given["input_ids"].shape[1]
    out = oracle.run_pass(ids, width, weigh="query_weights" in given)
    received = {"mass": out.mass, "new_mass": out.new_mass} if graph != "observe" else {}
    by_layer = {"present.{}.key": out.keys, "present.{}.value": out.values}
    by_layer |= {f"{name}.{{}}": each for name, each in received.items()}
    if graph == "observe":
        by_layer = {"mass.{}": out.mass}
    made = {
        name.format(layer): tensor.numpy()
        for name, each in by_layer.items()
        for layer, tensor in enumerate(each)
    }
    if graph == "decode":
        made["logits"] = out.logits.numpy()
    elif "next_ids" in given:
        next_ids = torch.from_numpy(given["next_ids"])
        made["novelty"] = oracle.core.novelty(out.logits, next_ids).numpy()
    return made


def _compare(report: Report, graph: str, made: Arrays, wanted: Arrays, where: str) -> None:
    kinds: dict[str, list[str]] = {}
    for name in wanted:
        kind = name.split(".")[0]
        kinds.setdefault("new rows" if kind == "present" else kind, []).append(name)
    for kind, names in kinds.items():
        pairs = [(made[name], wanted[name]) for name in names]
        if kind == "kept":
            off, most, what = _lost(pairs), DIFFER, "share of all"
        elif kind == "logits":
            off, most, what = 1 - _cosine(*pairs[0]), COSINE, "1 - cosine"
        else:
            off, most, what = max(_relative(*pair) for pair in pairs), NEAR, "of the largest"
        report.add(f"npu {graph}: {kind}", off, most, f"{what}, {where}")


def _relative(mine: Array, wanted: Array) -> float:
    """The largest difference, as a share of the largest value."""
    a, b = (numbers(each) for each in (mine, wanted))
    return float(np.abs(a - b).max() / np.abs(b).max())


def numbers(array: Array) -> Array:
    """Codes as numbers of steps, everything else as it is; float64."""
    return array.astype(np.float64) - (MIDDLE if array.dtype == np.uint16 else 0)


def _cosine(mine: Array, wanted: Array) -> float:
    a, b = (each.astype(np.float64).ravel() for each in (mine, wanted))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _lost(pairs: Iterable[tuple[Array, Array]]) -> float:
    """The share of wanted slots that were not kept."""
    rows = [
        (row, other[: row.size])
        for mine, wanted in pairs
        for other, row in zip(mine, wanted, strict=True)
    ]
    lost = sum(int(np.setdiff1d(row, kept).size) for row, kept in rows)
    return lost / sum(int(row.size) for row, _ in rows)
