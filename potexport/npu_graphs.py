"""Each compiled graph by itself: one run on the emulator over a pot that PyTorch filled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from potexport import htp
from potexport.bundle import Npu
from potexport.runtime.backend import padded
from potexport.runtime.onnxruntime_backend import map_weights
from potexport.spec import EMBEDDED, GraphSpec

if TYPE_CHECKING:
    from potexport.parity import Report
    from potexport.reference import TorchBackend
    from potexport.runtime.backend import Array
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
    manifest, chunk = eager.manifest, eager.manifest.pot.chunk
    eager.reset()
    eager.feed(ids[: (manifest.pot.slots // chunk - 1) * chunk + 1])
    oracle: TorchBackend = eager.backend  # type: ignore[assignment]
    fill = oracle.pot.fill
    if "mass" in manifest.policy.needs:
        oracle.observe(catalyst)
    table = None if npu.embedding is None else map_weights(folder / manifest.weights)[npu.embedding]
    ahead = ids[fill : fill + chunk + 1]
    tokens = {"prefill": ahead[:-1], "decode": ahead[:1], "observe": catalyst}
    given = {
        graph: _inputs(manifest.graphs[graph], oracle, tokens.get(graph), ahead[1:], table)
        for graph in files
    }
    given["compress"]["keep"][0] = manifest.pot.keep
    made = htp.run(files, given)
    where = f"over {fill} of {manifest.pot.slots} slots, against PyTorch in fp32"
    for graph, outputs in made.items():
        _compare(report, graph, outputs, _expected(graph, oracle, given[graph], tokens), where)


def _inputs(
    spec: GraphSpec, oracle: TorchBackend, ids: Array | None, next_ids: Array, table: Array | None
) -> Arrays:
    """What a graph is given, in the types of its context."""
    if table is not None:
        spec = spec.with_embeddings(table.shape[1], table.dtype.name)
    pot = oracle.pot
    per_slot = {"mass": pot.mass, "novelty": pot.novelty}
    arrays: Arrays = {}
    for tensor in spec.inputs:
        array = arrays[tensor.name] = np.zeros(tensor.shape, tensor.dtype)
        kind, *rest = tensor.name.split(".")
        if kind == "past_key_values":
            array[...] = (pot.keys if rest[1] == "key" else pot.values)[int(rest[0])]
        elif kind in per_slot:
            array[...] = per_slot[kind][int(rest[0])]
        elif kind == "past_seq_len":
            array[...] = pot.fill
        elif kind == "next_ids":
            padded(array, next_ids)
        elif kind == "query_weights" and ids is not None:
            array[: ids.size] = 1
        elif kind == "input_ids" and ids is not None:
            padded(array, ids)
        elif kind == EMBEDDED and ids is not None and table is not None:
            array[0, : ids.size] = table[ids]
    return arrays


def _expected(
    graph: str, oracle: TorchBackend, given: Arrays, tokens: Mapping[str, Array]
) -> Arrays:
    """What the reference makes of the same, by the names of the contract."""
    import torch

    if graph == "compress":
        fill = oracle.pot.fill
        kept = oracle.compress(int(given["keep"][0]))
        oracle.pot.fill = fill
        return {f"kept.{layer}": slots for layer, slots in enumerate(kept)}
    ids = tokens[graph]
    width = given[EMBEDDED if EMBEDDED in given else "input_ids"].shape[1]
    keys, values, logits, mass = oracle.run_pass(ids, width, observe=graph == "observe")
    if graph == "observe":
        return {f"mass.{layer}": tensor.numpy() for layer, tensor in enumerate(mass)}
    made = {f"present.{layer}.key": array for layer, array in enumerate(keys)}
    made |= {f"present.{layer}.value": array for layer, array in enumerate(values)}
    if graph == "decode":
        made["logits"] = logits.numpy()
    elif "next_ids" in given:
        made["novelty"] = oracle.core.novelty(logits, torch.from_numpy(given["next_ids"])).numpy()
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
    return float(np.abs(mine.astype(np.float64) - wanted).max() / np.abs(wanted).max())


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
