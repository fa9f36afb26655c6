"""The manifest: the contract between the build and the runtime.

A bundle is a folder with `potexport.json`, the graphs, their weights and the text files. This file
reads and writes the manifest and checks the folder against it; it imports only the standard
library, for the runtime uses it too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from potexport.coding import POT_DTYPES
from potexport.errors import PotexportError
from potexport.geometry import ModelFacts, PotGeometry
from potexport.spec import ITEM_BYTES, GraphSpec, Layout, TensorSpec

MANIFEST = "potexport.json"
FORMAT = 5
# Of a coded pot: `potexport.channels`.
KEY_FILES = ("key_channels.npy", "key_turns.npy")
LARGEST_MANIFEST = 64 << 20  # bytes; ours are well below one MiB for a hundred layers
T = TypeVar("T")


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
    if not path.is_file():
        raise PotexportError(
            f"{folder} has no {MANIFEST}; it is not a bundle, or its build was interrupted"
        )
    if path.stat().st_size > LARGEST_MANIFEST:
        raise PotexportError(
            f"{path} has {path.stat().st_size} bytes; a manifest has at most {LARGEST_MANIFEST}"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PotexportError(
            f"{path} is not valid JSON ({_first_line(error)}); build the bundle again"
        ) from error
    version = document.get("format") if isinstance(document, dict) else None
    if not isinstance(version, int):
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
    manifest = Manifest(
        model=ModelFacts(**document["model"]),
        pot=_pot(document["pot"]),
        policies=tuple(
            PolicyFacts(**{**entry, "needs": tuple(entry["needs"])})
            for entry in document["policies"]
        ),
        graphs={name: _graph(name, entry) for name, entry in document["graphs"].items()},
        files={_plain_name(name): FileFacts(**entry) for name, entry in document["files"].items()},
        weights=_plain_name(document["weights"]),
        eos_token_ids=tuple(int(token) for token in document["eos_token_ids"]),
        tools={str(name): str(version) for name, version in document["tools"].items()},
        npu=tuple(_npu(entry) for entry in document.get("npu", ())),
        program=_program(document.get("program")),
        pot_dtype=_pot_dtype(document.get("pot_dtype", "")),
        in_place=document.get("in_place", False) is True,
        **{
            name: str(document[name])
            for name in ("precision", "target", "runtime", "catalyst", "source")
        },
    )
    manifest.pot.check()
    for each in (manifest.pot.layer_slots, manifest.pot.windows):
        if len(each) not in (0, manifest.model.layers):
            raise ValueError(f"its pot has slots or windows of {len(each)} layers")
    if not manifest.policies:
        raise ValueError("it has no policy")
    expected = manifest.layout.graphs()
    if manifest.graphs != expected:
        differing = sorted(set(manifest.graphs) ^ set(expected)) or [
            n for n in expected if manifest.graphs[n] != expected[n]
        ]
        raise ValueError(f"its graphs {differing} do not fit its model and pot")
    for name in manifest.graphs:
        file = document["graphs"][name]["file"]
        if file != manifest.file_of(name):
            raise ValueError(f"graph {name} is in {file!r}, not in {manifest.file_of(name)}")
    for npu in manifest.npu:
        if not set(manifest.graphs) - {"compress"} <= set(npu.contexts) <= set(manifest.graphs):
            raise ValueError(f"its contexts for {npu.soc} are {sorted(npu.contexts)}")
    for name in (
        manifest.weights,
        "tokenizer.json",
        *(KEY_FILES if manifest.layout.coding else ()),
        *(manifest.file_of(graph) for graph in manifest.graphs),
        *(context.file for npu in manifest.npu for context in npu.contexts.values()),
    ):
        if name not in manifest.files:
            raise ValueError(f"{name} is not among its files")
    return manifest


def _graph(name: str, entry: Mapping[str, Any]) -> GraphSpec:
    def tensors(kind: str) -> tuple[TensorSpec, ...]:
        specs = tuple(
            TensorSpec(t["name"], t["dtype"], tuple(int(d) for d in t["shape"]))
            for t in entry[kind]
        )
        unknown = [spec.dtype for spec in specs if spec.dtype not in ITEM_BYTES]
        if unknown:
            raise ValueError(f"graph {name} has tensors of type {unknown[0]}")
        return specs

    return GraphSpec(name, tensors("inputs"), tensors("outputs"))


def _pot(entry: Mapping[str, Any]) -> PotGeometry:
    lists = {name: tuple(int(n) for n in entry[name]) for name in ("layer_slots", "windows")}
    return PotGeometry(**{**entry, **lists})


def _pot_dtype(name: str) -> str:
    if name and name not in POT_DTYPES:
        raise ValueError(f"its pot is of type {name!r}")
    return name


def _npu(entry: Mapping[str, Any]) -> Npu:
    contexts = {name: Context(**facts) for name, facts in entry["contexts"].items()}
    for context in contexts.values():
        _plain_name(context.file)
    return Npu(**{**entry, "contexts": contexts})


def _program(entry: Mapping[str, Any] | None) -> Program | None:
    if entry is None:
        return None
    methods = {name: Delegation(**facts) for name, facts in entry["methods"].items()}
    return Program(**{**entry, "methods": methods})


def _plain_name(name: str) -> str:
    """A file directly in the bundle: a manifest must not make the runtime read elsewhere."""
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or any(c in name for c in "/\\:\0")
    ):
        raise ValueError(f"{name!r} is not the name of a file in the bundle")
    return name


def check_files(
    folder: str | os.PathLike[str], manifest: Manifest, *, digests: bool = True
) -> None:
    """Compare the folder with its manifest; PotexportError names the first file that is missing,
    truncated or altered."""
    for name, facts in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file() or path.is_symlink():
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    name = type(error).__name__ if isinstance(error, (KeyError, AttributeError)) else ""
    return f"{name} {error}".strip().splitlines()[0][:200]
