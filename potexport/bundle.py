"""The manifest: the contract between the build and the runtime.

A bundle is a folder with `potexport.json`, the graphs, their weights and the text files. This file
reads and writes the manifest and checks the folder against it; it imports only the standard
library, for the runtime uses it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from potexport import strict
from potexport.coding import POT_DTYPES
from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry
from potexport.spec import ITEM_BYTES, SCORES, GraphSpec, Layout

MANIFEST = "potexport.json"
FORMAT = 5
# Of a coded pot: `potexport.channels`.
KEY_FILES = ("key_channels.npy", "key_turns.npy")
LARGEST_MANIFEST = 16 << 20  # bytes; ours are well below one MiB for a hundred layers
# What a model may have; the largest that is known has half of each, or less.
LARGEST: Mapping[str, int] = {
    "layers": 512, "query_heads": 1024, "kv_heads": 1024, "head_size": 1024,
    "vocab_size": 1 << 20, "max_positions": 1 << 31
}  # fmt: skip
MOST_POLICIES = 32
NEEDS = frozenset({*SCORES, "keys", "values", "queries"})
ROWS = ("float32", "float16", "uint16")


@dataclass(frozen=True)
class PolicyFacts:
    """A policy and the compression graph that holds it.

    label: how a person names it among those of the bundle. needs: what the runtime must gather for
    it; window: of how many of the last tokens it wants the attention, 0 for none. can_be_blind: it
    scores without a catalyst, too.
    """

    label: str
    name: str
    needs: tuple[str, ...]
    settings: dict[str, Any]
    graph: str = "compress"
    window: int = 0
    can_be_blind: bool = True


@dataclass(frozen=True)
class FileFacts:
    """One file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Context:
    """One graph, compiled. bytes: of its files; those that share weights have them in the first.

    nodes: operator -> how many, all on the chip. rewrites: what was written differently for it, and
    how often. seconds, peak_memory (bytes): of the compiler.
    """

    file: str
    bytes: int
    seconds: float
    peak_memory: int
    nodes: dict[str, int]
    rewrites: dict[str, int]


@dataclass(frozen=True)
class Npu:
    """The graphs of a bundle, compiled for one chip; they share one copy of the weights.

    embedding: the weight that the host looks token ids up in; None where the graphs take ids.
    contexts: by graph; `compress` is missing where compressions run on the CPU.
    gate: the smallest share, of any head, of kept slots that the emulator's compression and the
        CPU's agreed on when the bundle was built; None if nobody looked.
    """

    soc: str
    chip: str
    htp_arch: int
    soc_model: int
    embedding: str | None
    contexts: dict[str, Context]
    gate: float | None = None

    @property
    def compress_on(self) -> str:
        return "npu" if "compress" in self.contexts else "cpu"


@dataclass(frozen=True)
class Delegation:
    """One method of an ExecuTorch program: operators that the delegate took, of all, in how many
    pieces."""

    delegated: int
    operators: int
    pieces: int


@dataclass(frozen=True)
class Program:
    """The graphs of a bundle as methods of one ExecuTorch program.

    delegate: as ExecuTorch registers it. source_sha256: of the weights it was made from
        (`facts.weights_sha256`). shared: bytes that delegate and program both need, and that are
        stored once.
    """

    delegate: str
    methods: dict[str, Delegation]
    source_sha256: str
    shared: int = 0


@dataclass(frozen=True)
class Manifest:
    """All that a runtime has to know of a bundle.

    weights: the safetensors file, or the ExecuTorch program, which holds its own. eos_token_ids:
    any of them ends an answer. npu: one entry a chip. program: of bundles for ExecuTorch.
    policies: the first is used unless another is asked for. pot_dtype, in_place: see `Layout`.
    """

    model: ModelFacts
    pot: PotGeometry
    policies: tuple[PolicyFacts, ...]
    precision: str
    target: str
    runtime: str
    catalyst: str
    source: str
    eos_token_ids: tuple[int, ...]
    graphs: dict[str, GraphSpec]
    weights: str
    tools: dict[str, str]
    pot_dtype: str = ""
    in_place: bool = False
    npu: tuple[Npu, ...] = ()
    program: Program | None = None
    files: dict[str, FileFacts] = field(default_factory=dict)

    def file_of(self, graph: str) -> str:
        """The file that holds a graph."""
        return self.weights if self.program else f"{graph}.onnx"

    @property
    def policy(self) -> PolicyFacts:
        """The one that is used unless another is asked for."""
        return self.policies[0]

    def catalyst_of(self, policy: PolicyFacts) -> str:
        """What scores the pot for a policy where nothing else was said. One that can do without
        goes without, where the text is there for the sake of another."""
        shared = not all(each.can_be_blind for each in self.policies)
        return "" if policy.can_be_blind and shared else self.catalyst

    def policy_of(self, label: str) -> PolicyFacts:
        """The one of this label; PotexportError lists them all if there is none."""
        for policy in self.policies:
            if policy.label == label:
                return policy
        has = ", ".join(policy.label for policy in self.policies)
        raise PotexportError(
            f"the bundle has no policy {label!r}; it has {has}: build it with --policy {label}"
        )

    @property
    def layout(self) -> Layout:
        others = tuple((each.graph, frozenset(each.needs)) for each in self.policies[1:])
        needs = frozenset(self.policy.needs)
        return Layout(
            self.model, self.pot, needs, self.dtype, others, self.pot_dtype, self.in_place
        )

    @property
    def dtype(self) -> str:
        """The float type of new rows, and of the pot unless `pot_dtype` says otherwise."""
        return next(
            tensor.dtype
            for tensor in self.graphs["decode"].outputs
            if tensor.name.startswith("present")
        )

    def to_json(self) -> str:
        graphs = {
            name: {"file": self.file_of(name), **spec.to_json()}
            for name, spec in self.graphs.items()
        }
        return json.dumps({"format": FORMAT, **asdict(self), "graphs": graphs}, indent=1) + "\n"


def read(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a bundle, or a PotexportError that says what is wrong with it."""
    path = Path(folder) / MANIFEST
    if not Path(folder).is_dir():
        raise PotexportError(f"{folder} is not a folder; give a bundle made by `potexport build`")
    if not strict.is_file_in(folder, MANIFEST):
        raise PotexportError(
            f"{folder} has no {MANIFEST}; it is not a bundle, or its build was interrupted"
        )
    if path.stat().st_size > LARGEST_MANIFEST:
        raise PotexportError(
            f"{path} has {path.stat().st_size} bytes; a manifest has at most {LARGEST_MANIFEST}"
        )
    try:
        document = strict.loads(strict.text(path, LARGEST_MANIFEST))
    except (ValueError, RecursionError) as error:
        raise PotexportError(
            f"{path} is not valid JSON ({_first_line(error)}); build the bundle again"
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if type(version) is not int:
        raise PotexportError(f"{path} has no format version; it is not a manifest of potexport")
    if version < FORMAT:
        raise PotexportError(
            f"{path} has format {version}, older than the {FORMAT} that this potexport reads; "
            "build the bundle again"
        )
    if version > FORMAT:
        raise PotexportError(
            f"{path} has format {version}, newer than the {FORMAT} that this potexport reads; "
            "update potexport (pip install -U potexport) or build the bundle with this version"
        )
    try:
        return _parse(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PotexportError(
            f"{path} is not a valid manifest ({_first_line(error)}); build the bundle again"
        ) from error


def _parse(document: dict[str, Any]) -> Manifest:
    given = {each.name: document[each.name] for each in fields(Manifest) if each.name in document}
    given["graphs"] = {
        name: {"name": name, **{kind: entry[kind] for kind in ("inputs", "outputs")}}
        for name, entry in document["graphs"].items()
    }
    manifest = strict.made(Manifest, given)
    manifest.pot.check()
    _check_numbers(manifest)
    _check_names(manifest)
    spoken = "".join(manifest.catalyst.split())[:1000]  # it may have lines, and be long
    if not all(map(strict.is_plain, strict.words({**document, "catalyst": spoken}))):
        raise ValueError("its words are not printable")
    _check_graphs(manifest, document["graphs"])
    for name in (
        manifest.weights,
        "tokenizer.json",
        *(KEY_FILES if manifest.layout.coding else ()),
        *(manifest.file_of(graph) for graph in manifest.graphs),
        *(context.file for npu in manifest.npu for context in npu.contexts.values()),
    ):
        if name not in manifest.files:
            raise ValueError(f"{name!r} is not among its files")
    return manifest


def _check_numbers(manifest: Manifest) -> None:
    """ValueError for numbers that no model has, before anything is made as large as they say."""
    for name, most in LARGEST.items():
        if not 1 <= getattr(manifest.model, name) <= most:
            raise ValueError(f"{name} is {getattr(manifest.model, name)}, not from 1 to {most}")
    if not 1 <= len(manifest.policies) <= MOST_POLICIES:
        raise ValueError(f"it has {len(manifest.policies) or 'no'} policies")
    layers, vocabulary = manifest.model.layers, manifest.model.vocab_size
    for each in (manifest.pot.layer_slots, manifest.pot.windows):
        if len(each) not in (0, layers):
            raise ValueError(f"its pot has slots or windows of {len(each)} layers")
    if not all(0 <= window < manifest.pot.positions for window in manifest.pot.windows):
        raise ValueError("its windows are outside its positions")
    if not all(0 <= token < vocabulary for token in manifest.eos_token_ids):
        raise ValueError("its eos_token_ids are outside its vocabulary")
    if not all(0 <= policy.window <= manifest.pot.catalyst_width for policy in manifest.policies):
        raise ValueError("a policy looks at more tokens than its pot has a width for")
    if not all(facts.size >= 0 for facts in manifest.files.values()):
        raise ValueError("a file has a negative size")


def _check_names(manifest: Manifest) -> None:
    """ValueError for names that lead elsewhere, or to nothing."""
    first, *others = manifest.policies
    graphs = [policy.graph for policy in others]
    own = all(re.fullmatch(r"compress_\w+", graph) for graph in graphs)
    if first.graph != "compress" or not own or len(set(graphs)) < len(graphs):
        raise ValueError("the graphs of its policies are not compress, compress_…")
    for policy in manifest.policies:
        if not set(policy.needs) <= NEEDS:
            raise ValueError(f"a policy needs {policy.needs}")
    contexts = (context.file for npu in manifest.npu for context in npu.contexts.values())
    for name in (*manifest.files, manifest.weights, *contexts):
        _plain_name(name)
    if manifest.pot_dtype and manifest.pot_dtype not in POT_DTYPES:
        raise ValueError(f"its pot is of type {manifest.pot_dtype!r}")


def _check_graphs(manifest: Manifest, entries: Mapping[str, Any]) -> None:
    """ValueError for graphs that are not those of its model and pot."""
    for name, spec in manifest.graphs.items():
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.dtype not in ITEM_BYTES or min(tensor.shape, default=0) < 1:
                raise ValueError(f"graph {name} has a tensor of type {tensor.dtype!r}, or empty")
    rows = (t for t in manifest.graphs["decode"].outputs if t.name.startswith("present"))
    if next((t.dtype for t in rows), "") not in ROWS:
        raise ValueError("its rows are of no type that a pot has")
    layout = manifest.layout
    if layout.in_place and not (layout.pot.uniform and not layout.pot_dtype):
        raise ValueError("its pot is none that is written in place")
    if layout.coding and (layout.windowed or layout.facts.head_size % 2):
        raise ValueError("its pot is none that can be coded")
    expected = layout.graphs()
    if manifest.graphs != expected:
        differing = sorted(set(manifest.graphs) ^ set(expected)) or [
            n for n in expected if manifest.graphs[n] != expected[n]
        ]
        raise ValueError(f"its graphs {differing} do not fit its model and pot")
    for name in manifest.graphs:
        file = entries[name]["file"]
        if file != manifest.file_of(name):
            raise ValueError(f"graph {name} is in {file!r}, not in {manifest.file_of(name)}")
    for npu in manifest.npu:
        if not set(manifest.graphs) - {"compress"} <= set(npu.contexts) <= set(manifest.graphs):
            raise ValueError(f"its contexts for {npu.soc} are {sorted(npu.contexts)}")


def _plain_name(name: str) -> None:
    """A file directly in the bundle: a manifest must not make the runtime read elsewhere."""
    if name in ("", ".", "..") or any(c in name for c in "/\\:") or not strict.is_plain(name):
        raise ValueError(f"{name!r} is not the name of a file in the bundle")


def check_files(
    folder: str | os.PathLike[str], manifest: Manifest, *, digests: bool = True
) -> None:
    """Compare the folder with its manifest; PotexportError names the first file that is missing,
    truncated or altered."""
    for name, facts in manifest.files.items():
        path = Path(folder) / name
        if not strict.is_file_in(folder, name):
            raise PotexportError(
                f"{path} is missing; copy the whole bundle again, or build it anew"
            )
        size = path.stat().st_size
        if size != facts.size:
            kind = "truncated" if size < facts.size else "altered"
            raise PotexportError(
                f"{path} is {kind}: {size} bytes where the manifest has {facts.size}; copy the "
                "bundle again"
            )
        if digests and sha256(path) != facts.sha256:
            raise PotexportError(
                f"{path} is altered: its SHA-256 is not the manifest's; copy the bundle again"
            )


def sha256(path: Path) -> str:
    with strict.regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    name = type(error).__name__ if isinstance(error, (KeyError, AttributeError)) else ""
    line = f"{name} {error}".strip().splitlines()[0][:200]
    return "".join(c if c.isprintable() else "?" for c in line)
