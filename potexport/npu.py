"""The compile step of the NPU targets: a bundle's graphs become contexts for each chip.

The contexts of a chip share one copy of the weights, as a phone wants them. The portable graphs
stay in the bundle: a CPU runs them, and `verify` compiles them apart for the emulator.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potexport import htp
from potexport.bundle import Context, Npu
from potexport.npu_graphs import numbers
from potexport.runtime.backend import Array
from potexport.runtime.qnn_backend import emulated
from potexport.spec import SCORES, Layout, TensorSpec
from potexport.targets import Soc

PACKAGE = "onnxruntime-qnn"
COMPRESS_ON = ("npu", "cpu")
# What the gate asks of the emulator: kept slots as on the CPU, and turned keys near them.
ENOUGH, NEAR = 0.99, 0.02
require = htp.require


def compile_into(
    folder: Path,
    layout: Layout,
    socs: Sequence[Soc],
    *,
    compress_on: str | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> tuple[Npu, ...]:
    """Add to a folder of graphs their contexts for each chip.

    Args:
        compress_on: "npu", "cpu", or None for what the gate allows.

    Raises PotexportError if the HTP refuses a node, or the compiler crashes or takes too long.
    """
    made = []
    for soc in socs:
        graphs, gate = list(layout.graphs()), None
        if compress_on != "cpu" and emulated():
            stage(f"try compress on the emulator of {soc.name}")
            gate = try_compress(folder, layout, soc)
        if compress_on == "cpu" or (compress_on is None and gate is not None and not gate.passed):
            graphs.remove("compress")
        stage(f"compile for {soc.name}")
        done = htp.compile_graphs(folder, graphs, soc, folder, shared=True)
        made.append(_npu(soc, done, None if gate is None else gate.kept))
    return tuple(made)


def _npu(soc: Soc, done: Sequence[htp.Compiled], gate: float | None) -> Npu:
    contexts = {
        each.graph: Context(
            file=htp.context_file(each.graph, soc),
            bytes=each.bytes,
            seconds=round(each.seconds, 3),
            peak_memory=each.peak_memory,
            nodes=each.nodes,
            rewrites=each.rewrites,
        )
        for each in done
    }
    embedding = next((each.embedding for each in done if each.embedding), None)
    return Npu(soc.name, soc.chip, soc.htp_arch, soc.soc_model, embedding, contexts, gate)


@dataclass(frozen=True)
class Gate:
    """kept: the share of kept slots that the emulator and the CPU both chose. keys: the largest
    difference of a turned key where they did, as a share of the largest key."""

    kept: float
    keys: float

    @property
    def passed(self) -> bool:
        return self.kept >= ENOUGH and self.keys <= NEAR


def try_compress(folder: Path, layout: Layout, soc: Soc) -> Gate:
    """Run the compression graph on the emulator and on the CPU, over the same full pot."""
    import onnxruntime

    given = _full_pot(layout)
    with tempfile.TemporaryDirectory(prefix="potexport-gate-") as place:
        files = htp.contexts(Path(place), ["compress"], soc)
        htp.compile_graphs(folder, ["compress"], soc, Path(place), shared=False)
        mine = htp.run(files, {"compress": given})["compress"]
    session = onnxruntime.InferenceSession(
        folder / "compress.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    wanted = dict(zip(names, session.run(names, given), strict=True))
    return _compare(mine, wanted, layout)


def _full_pot(layout: Layout) -> dict[str, Array]:
    """Inputs of a compression: random rows, and scores that no rounding to fp16 can exchange."""
    random, slots = np.random.default_rng(0), layout.pot.slots
    filled = [layout.pot.slots_of(layer) for layer in range(layout.counts)]

    def content(tensor: TensorSpec) -> Array:
        if tensor.name == "past_seq_len":
            return np.array(filled, np.int32)
        if tensor.name == "keep":
            return np.full(layout.counts, layout.pot.keep, np.int32)
        if tensor.name == "pinned":
            return np.array([layout.pot.sink + 1], np.int32)
        if tensor.name in ("reset", "back"):
            return np.array([1], np.int32)
        if tensor.name.startswith("positions"):  # far apart, as after many compressions
            apart = layout.pot.positions // slots
            return np.tile(np.arange(slots, dtype=np.int32) * apart, (tensor.shape[0], 1))
        if tensor.name.startswith(SCORES):
            order = [random.permutation(slots) for _ in range(tensor.shape[0])]
            return (np.stack(order) / 64).astype(tensor.dtype)
        if tensor.dtype == "uint16":  # codes, with room for a turn
            return random.integers(2**14, 3 * 2**14, tensor.shape).astype(np.uint16)
        return random.standard_normal(tensor.shape, np.float32).astype(tensor.dtype)

    return {tensor.name: content(tensor) for tensor in layout.graphs()["compress"].inputs}


def _compare(mine: dict[str, Array], wanted: dict[str, Array], layout: Layout) -> Gate:
    keep, both, off = layout.pot.keep, 0, 0.0
    for layer in layout.chosen:
        kept, expected = (out[f"kept.{layer}"][:, :keep] for out in (mine, wanted))
        both += sum(np.intersect1d(a, b).size for a, b in zip(kept, expected, strict=True))
        same = np.flatnonzero((kept == expected).all(axis=1))  # heads
        keys = (out[f"present.{layer}.key"][0, same, :, :keep] for out in (mine, wanted))
        a, b = (numbers(each) for each in keys)
        if same.size:
            off = max(off, float(np.abs(a - b).max() / np.abs(b).max()))
    heads = len(layout.chosen) * layout.facts.kv_heads
    return Gate(both / (heads * keep), off)
