"""`coverage`: what each graph of a bundle becomes on an NPU, and where it first loses precision.

Layer by layer, the values on the HTP's emulator are held against the same graph in fp32 on the CPU,
over the same pot, which the runtime filled. Where the error jumps, the layer is opened and its
values are compared one by one. A tap makes the compiler keep a value that it might have fused away:
the tapped graph is close to the shipped one, and not the same.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potexport import bundle, htp
from potexport.bundle import Manifest
from potexport.errors import PotexportError
from potexport.htp_process import work
from potexport.npu_graphs import inputs
from potexport.recording import enough_tokens
from potexport.runtime.backend import Array
from potexport.targets import Soc, android_npu, windows_npu

if TYPE_CHECKING:
    import onnx_ir as ir

    from potexport.runtime.session import Session
    from potexport.taps import Flow, Place

# Where the error jumps: larger than FLOOR, and more than JUMP times the largest before it.
FLOOR, JUMP = 0.02, 4.0
FP16_MAX = 65504.0
LOOKED_INTO = ("prefill", "decode")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Placement:
    """What became of one graph.

    written: ONNX operator -> nodes, in the bundle's file. rewrites: what `lower_htp` changed.
    became: operator, as compiled -> QNN's operators for one node -> nodes; "" where QNN has none of
    its own for it, because it was folded or fused. added: QNN's operators that belong to no node.
    refused: name and operator of each node that the HTP does not take.
    """

    graph: str
    seconds: float
    written: dict[str, int]
    rewrites: dict[str, int]
    became: dict[str, dict[str, int]]
    added: dict[str, int]
    refused: tuple[tuple[str, str], ...]

    @property
    def taken(self) -> int:
        """Nodes that are not refused."""
        return sum(sum(kinds.values()) for kinds in self.became.values())


@dataclass(frozen=True)
class Seen:
    """One value on the HTP against fp32.

    error: |mine - reference| / |reference|, Euclidean norms over the whole tensor. cosine: between
    the two. largest: of the reference, to be held against fp16's 65504. finite: on the HTP.
    """

    value: str
    part: str
    operator: str
    error: float
    cosine: float
    largest: float
    finite: bool


@dataclass(frozen=True)
class Depth:
    """One graph, layer by layer, then what it gives. rows: the errors of the new keys and values of
    each layer. broken: the first of `layers` where the error jumps, or that of its rows, and the
    first of `inside`, which are the values of that layer; None where it does not."""

    graph: str
    fill: int
    tokens: int
    layers: tuple[Seen, ...]
    rows: tuple[float, ...]
    broken: int | None
    inside: tuple[Seen, ...]
    broken_inside: int | None


@dataclass(frozen=True)
class Coverage:
    """The whole report."""

    bundle: str
    soc: str
    placements: tuple[Placement, ...]
    depths: tuple[Depth, ...]

    @property
    def passed(self) -> bool:
        refused = any(each.refused for each in self.placements)
        return not refused and all(each.broken is None for each in self.depths)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "floor": FLOOR, "jump": JUMP}


def chip(folder: Path, name: str | None) -> Soc:
    """The chip of this name; by default the first that a bundle was compiled for.

    Raises PotexportError if there is none.
    """
    if name is None and (made := _of_onnx(folder).npu):
        return Soc(made[0].soc, made[0].chip, made[0].htp_arch, made[0].soc_model)
    every = replace(android_npu.TARGET, socs=(*android_npu.TARGET.socs, *windows_npu.TARGET.socs))
    return every.chips([name] if name else [])[0]


def _of_onnx(folder: Path) -> Manifest:
    """The manifest of a bundle, which must have ONNX graphs."""
    manifest = bundle.read(folder)
    if manifest.program:
        raise PotexportError(
            "this bundle is for ExecuTorch, whose delegate inspect shows; coverage looks at what "
            "an NPU makes of ONNX graphs"
        )
    return manifest


def report(
    folder: Path,
    soc: Soc,
    *,
    text: str | None = None,
    graphs: Sequence[str] = (),
    on_stage: Tell = lambda _: None,
) -> Coverage:
    """Compile every graph of a bundle for a chip, and look into those that read tokens.

    Args:
        text: what fills the pot; seeded random tokens by default.
        graphs: those to look at; all by default.

    Raises PotexportError if the bundle is damaged, the text too short, or the compiler fails.
    """
    htp.require()
    from potexport.runtime.session import Session

    manifest = _of_onnx(folder)
    bundle.check_files(folder, manifest, digests=False)
    unknown = [name for name in graphs if name not in manifest.graphs]
    if unknown:
        raise PotexportError(
            f"the bundle has no graph {unknown[0]!r}; choose: {', '.join(manifest.graphs)}"
        )
    chosen = [name for name in manifest.graphs if name in graphs or not graphs]
    placements = tuple(_placement(folder, name, soc, on_stage) for name in chosen)
    looked_into = [name for name in LOOKED_INTO if name in chosen]
    if not looked_into:
        return Coverage(str(folder), soc.name, placements, ())
    on_stage("fill the pot on the CPU")
    session = Session.open(folder, backend="cpu", check=False)
    following = _fill(session, _ids(session, text))
    depths = []
    for name in looked_into:
        spec, width = manifest.graphs[name], 1 if name == "decode" else manifest.pot.chunk
        given = inputs(
            spec, session.backend.pot, following[:width], following[1 : width + 1], keep=0
        )
        depths.append(_depth(folder, name, soc, given, manifest, on_stage))
    return Coverage(str(folder), soc.name, placements, tuple(depths))


def jump(errors: Iterable[tuple[float, bool]]) -> int | None:
    """Where the error jumps first, in a row of (error, whether all numbers are finite)."""
    before = 0.0
    for place, (error, finite) in enumerate(errors):
        # Not `error > …`: a NaN must not pass.
        if not (finite and error <= max(FLOOR, JUMP * before)):
            return place
        before = max(before, error)
    return None


def seen(place: Place, mine: Array, reference: Array) -> Seen:
    """Compare one value; any shapes, float."""
    a, b = mine.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    finite = bool(np.isfinite(a).all())
    with np.errstate(invalid="ignore", over="ignore"):
        off, size, own = (float(np.sqrt((each * each).sum())) for each in (a - b, b, a))
        cosine = float((a * b).sum()) / (size * own) if size and own else float(size == own)
    error = off / size if size else off
    largest = float(np.abs(b).max(initial=0.0))
    return Seen(place.name, place.part, place.operator, error, cosine, largest, finite)


def _placement(folder: Path, name: str, soc: Soc, on_stage: Tell) -> Placement:
    on_stage(f"compile {name} for {soc.name}")
    job = {"do": "place", "graphs": [name]}
    line = _child(folder, soc, job)[-2]
    return Placement(
        graph=name,
        refused=tuple((node, kind) for node, kind in line["refused"]),
        **{key: line[key] for key in ("seconds", "written", "rewrites", "became", "added")},
    )


def _child(folder: Path, soc: Soc, job: dict[str, Any]) -> list[dict[str, Any]]:
    with htp.rewritten_graphs(folder) as prefix:
        where = {"bundle": os.fspath(folder.absolute()), "prefix": prefix}
        chip = [soc.name, soc.htp_arch, soc.soc_model]
        return work({**job, **where, "soc": chip}, timeout=htp.TIMEOUT)


def _ids(session: Session, text: str | None) -> Array:
    """Tokens to fill the pot once, compress it, fill half of what is free, and one pass more."""
    pot = session.manifest.pot
    needed = pot.slots + (pot.slots - pot.keep) // 2 + 2 * pot.chunk + 1
    short = f"to fill this pot and compress it takes {needed}: give a longer --text"
    return enough_tokens(session, text, needed, short)


def _fill(session: Session, ids: Array) -> Array:
    """Read all but the last pass, with one compression at least; the tokens that come next."""
    pot = session.manifest.pot
    session.feed(ids[: ids.size - pot.chunk - 1])
    if session.backend.pot.fill + pot.chunk > pot.slots:
        session.compress()
    return ids[session.stats.tokens_read :]


def _depth(
    folder: Path,
    name: str,
    soc: Soc,
    inputs: dict[str, Array],
    manifest: Manifest,
    on_stage: Tell,
) -> Depth:
    """Look behind each layer of a graph, and into the first whose error jumps."""
    import onnx_ir as ir

    from potexport.taps import Flow, Place

    flow = Flow(ir.load(folder / f"{name}.onnx").graph)
    behind = [
        Place(str(value.name), f"layer {layer}", "") for layer, value in enumerate(flow.layers())
    ]
    outputs = [Place(each.name, each.name, "") for each in manifest.graphs[name].outputs]
    on_stage(f"{name}, layer by layer")
    found = _compare(folder, name, soc, inputs, flow, [*behind, *outputs])
    layers = [each for each in found if not each.part.startswith("present.")]
    rows = _rows(found, len(behind))
    errors = [
        (max(each.error, row), each.finite)
        for each, row in zip(layers, chain(rows, repeat(0.0)), strict=False)
    ]
    broken = jump(errors)
    inside: list[Seen] = []
    layer = None if broken is None else _index(layers[broken].value, behind)
    if layer is not None:
        on_stage(f"{name}, inside layer {layer}")
        inside = _compare(folder, name, soc, inputs, flow, flow.inside(layer))
    before = [max(errors[:broken])] if broken else []
    hit = jump([*before, *((each.error, each.finite) for each in inside)])
    return Depth(
        graph=name,
        fill=int(inputs["past_seq_len"][0]),
        tokens=inputs["input_ids"].size,
        layers=tuple(layers),
        rows=tuple(rows),
        broken=broken,
        inside=tuple(inside),
        broken_inside=None if hit is None or not inside else max(0, hit - len(before)),
    )


def _index(name: str, behind: Sequence[Place]) -> int | None:
    """Which layer a value ends; none for what comes after the last."""
    return next((layer for layer, place in enumerate(behind) if place.name == name), None)


def _rows(found: Sequence[Seen], layers: int) -> list[float]:
    """The larger error of a layer's new keys and values; infinite where these are not finite."""
    errors = {each.part: each.error if each.finite else np.inf for each in found}
    names = [(f"present.{layer}.key", f"present.{layer}.value") for layer in range(layers)]
    return [max(errors.get(name, 0.0) for name in pair) for pair in names]


def _compare(
    folder: Path,
    name: str,
    soc: Soc,
    inputs: dict[str, Array],
    flow: Flow,
    places: Sequence[Place],
) -> list[Seen]:
    """Those of the places that the graph still has as it is compiled, on the HTP against fp32."""
    import onnx_ir as ir

    names = [place.name for place in places]
    rows = None if flow.embedded is None else str(flow.embedded.name)
    model = ir.load(folder / f"{name}.onnx")
    wanted = _in_fp32(model, [*names, *([rows] if rows else [])], inputs)
    mine = _on_htp(folder, name, soc, inputs, names, wanted.get(rows or ""))
    return [seen(each, mine[each.name], wanted[each.name]) for each in places if each.name in mine]


def _in_fp32(model: ir.Model, names: Sequence[str], inputs: dict[str, Array]) -> dict[str, Array]:
    """Values of the bundle's own graph, not rewritten, in fp32 on the CPU."""
    import onnxruntime

    from potexport import taps

    taps.single(model)
    found = taps.tap(model, names)
    with tempfile.TemporaryDirectory(prefix="potexport-fp32-") as folder:
        path = Path(folder) / "graph.onnx"
        taps.save(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        feeds = {
            name: array.astype(np.float32) if array.dtype == np.float16 else array
            for name, array in inputs.items()
        }
        return dict(zip(found, session.run(found, feeds), strict=True))


def _on_htp(
    folder: Path,
    name: str,
    soc: Soc,
    inputs: dict[str, Array],
    names: Sequence[str],
    rows: Array | None,
) -> dict[str, Array]:
    """Values of the graph on the emulator. rows: what the tokens are looked up to, (1, T, E)."""
    from potexport.spec import EMBEDDED

    with tempfile.TemporaryDirectory(prefix="potexport-htp-") as place:
        given, result = Path(place) / "inputs.npz", Path(place) / "result.npz"
        arrays: dict[str, Any] = {**inputs, **({} if rows is None else {EMBEDDED: rows})}
        np.savez(given, **arrays)
        job = {"do": "tap", "graphs": [name], "taps": list(names)}
        files = {"inputs": os.fspath(given), "result": os.fspath(result)}
        _child(folder, soc, {**job, **files})
        with np.load(result) as file:
            return {key: file[key] for key in file.files}
