"""The manifest: the contract between the build and the runtime.

A bundle is a folder with `potexport.json`, the graphs, their weights and the text files. This file
reads and writes the manifest and checks the folder against it; it imports only the standard
library, for the runtime uses it too.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from potexport.errors import PotexportError
from potexport.spec import (
    ITEM_BYTES,
    GraphSpec,
    Layout,
    ModelFacts,
    PotGeometry,
    TensorSpec,
)

MANIFEST = "potexport.json"
FORMAT = 1
LARGEST_MANIFEST = 64 << 20  # bytes; ours are well below one MiB for a hundred layers
T = TypeVar("T")


@dataclass(frozen=True)
class PolicyFacts:
    """Which policy the compression graph holds; `needs` says what the runtime must gather for
    it."""

    name: str
    needs: tuple[str, ...]
    settings: dict[str, Any]


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
    """

    model: ModelFacts
    pot: PotGeometry
    policy: PolicyFacts
    precision: str
    target: str
    runtime: str
    catalyst: str
    source: str
    eos_token_ids: tuple[int, ...]
    graphs: dict[str, GraphSpec]
    weights: str
    tools: dict[str, str]
    npu: tuple[Npu, ...] = ()
    program: Program | None = None
    files: dict[str, FileFacts] = field(default_factory=dict)

    def file_of(self, graph: str) -> str:
        """The file that holds a graph."""
        return self.weights if self.program else f"{graph}.onnx"

    @property
    def layout(self) -> Layout:
        return Layout(self.model, self.pot, frozenset(self.policy.needs), self.dtype)

    @property
    def dtype(self) -> str:
        """The float type of the pot."""
        return next(
            tensor.dtype
            for tensor in self.graphs["decode"].inputs
            if tensor.name.startswith("past_key_values")
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
        pot=PotGeometry(**document["pot"]),
        policy=PolicyFacts(**{**document["policy"], "needs": tuple(document["policy"]["needs"])}),
        graphs={name: _graph(name, entry) for name, entry in document["graphs"].items()},
        files={_plain_name(name): FileFacts(**entry) for name, entry in document["files"].items()},
        weights=_plain_name(document["weights"]),
        eos_token_ids=tuple(int(token) for token in document["eos_token_ids"]),
        tools={str(name): str(version) for name, version in document["tools"].items()},
        npu=tuple(_npu(entry) for entry in document.get("npu", ())),
        program=_program(document.get("program")),
        **{
            name: str(document[name])
            for name in ("precision", "target", "runtime", "catalyst", "source")
        },
    )
    manifest.pot.check()
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


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, last of all files, with the size and digest of every other."""
    files = {
        path.name: FileFacts(path.stat().st_size, sha256(path)) for path in sorted(folder.iterdir())
    }
    complete = Manifest(**{**manifest.__dict__, "files": files})
    (folder / MANIFEST).write_text(complete.to_json(), encoding="utf-8")


@contextmanager
def new_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `destination` if the block succeeds, and disappears if it
    does not.

    A killed build leaves the sibling, whose name begins with a dot, and never a half bundle; the
    next build of the same bundle removes it.
    """
    refuse_existing(destination, force=force)
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent, destination.name)
        prefix = f".{destination.name}.building-{os.getpid()}-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        raise PotexportError(
            f"cannot write beside {destination}: {error.strerror}; choose another --output"
        ) from error
    try:
        yield folder
        folder.chmod(0o755)
        if destination.exists():
            refuse_existing(destination, force=force)
            old = Path(tempfile.mkdtemp(prefix=prefix, dir=parent)) / "old"
            destination.rename(old)
            folder.rename(destination)
            shutil.rmtree(old.parent, ignore_errors=True)
        else:
            folder.rename(destination)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path, name: str) -> None:
    """Remove what killed builds of this bundle left; a build that is still running keeps its
    folder. Only where the system tells which processes run."""
    if not Path("/proc/self").exists():
        return
    for left in parent.glob(f".{glob.escape(name)}.building-*-*"):
        process = left.name.rsplit("-", 2)[1]
        if process.isdigit() and not Path("/proc", process).exists():
            shutil.rmtree(left, ignore_errors=True)


def refuse_existing(destination: Path, *, force: bool) -> None:
    """PotexportError if the destination is taken: always for what is not a bundle, without `force`
    for what is one."""
    if not destination.exists():
        return
    is_bundle = (destination / MANIFEST).is_file()
    if not force:
        hint = "add --force to replace it" if is_bundle else "choose another --output"
        raise PotexportError(f"{destination} exists; {hint}")
    if not is_bundle and not (destination.is_dir() and not any(destination.iterdir())):
        raise PotexportError(
            f"{destination} exists and is not a bundle, so --force does not replace it; choose "
            "another --output"
        )


def _first_line(error: Exception) -> str:
    name = type(error).__name__ if isinstance(error, (KeyError, AttributeError)) else ""
    return f"{name} {error}".strip().splitlines()[0][:200]
