"""Compiling graphs for Qualcomm's HTP, and running the loop on its emulator.

The compiler and the emulator are closed libraries that can crash, hang, or die of memory; so all of
their work is done by `htp_worker` in a process of its own (`htp_process`), and every way in which
that can end becomes a result or a PotexportError that names the graph. This file never imports
them.

Nothing of Qualcomm's is copied: contexts hold our graphs and weights, and the libraries stay in the
package onnxruntime-qnn, which each user installs.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potexport.errors import PotexportError
from potexport.htp_process import Progress, work
from potexport.recording import Recording
from potexport.runtime.backend import Array
from potexport.targets import Soc

TIMEOUT = 1800.0  # seconds a graph; thirty layers of SmolLM2 take a third of a minute


@dataclass(frozen=True)
class Compiled:
    """What became of one graph. nodes: operator -> how many, all of them on the HTP.

    bytes: of its context; where weights are shared, the first graph's holds them all.
    rewrites: what was written differently for the HTP, and how often. embedding: the weight whose
    rows the graph takes instead of ids, if it does.
    """

    graph: str
    seconds: float
    bytes: int
    peak_memory: int
    nodes: dict[str, int]
    rewrites: dict[str, int]
    embedding: str | None


def context_file(graph: str, soc: Soc) -> str:
    """The name of a graph's context; its binary lies beside it, as `…_qnn.bin`."""
    return f"{graph}.{soc.name}.onnx"


def contexts(folder: Path, graphs: Sequence[str], soc: Soc) -> dict[str, Path]:
    """Graph -> its context in a folder."""
    return {graph: folder / context_file(graph, soc) for graph in graphs}


def require() -> None:
    """PotexportError if the compiler is not installed."""
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        raise PotexportError(
            "compiling for the NPU needs the package onnxruntime-qnn; install it with: pip install "
            "'potexport[qnn]'"
        )


def compile_graphs(
    bundle: Path,
    graphs: Sequence[str],
    soc: Soc,
    output: Path,
    *,
    shared: bool,
    timeout: float = TIMEOUT,
    on_graph: Callable[[str], None] = lambda _: None,
) -> list[Compiled]:
    """Compile `bundle/<graph>.onnx` for a chip; contexts appear in `output` when all are done.

    Args:
        shared: one copy of the weights for all graphs, for a device; a single process makes them,
            and the x86 emulator cannot load them. Otherwise each graph is compiled in a process of
            its own and stands alone.
        timeout: seconds a graph.
        on_graph: told the name of each graph as it begins.

    Raises PotexportError, and leaves `output` as it was, if the HTP refuses a node (it names them),
    or the compiler crashes or takes too long.
    """
    require()
    output.mkdir(parents=True, exist_ok=True)
    groups = [list(graphs)] if shared else [[graph] for graph in graphs]
    # A folder of its own: the compiler refuses to replace a context, and may leave half of one.
    with (
        tempfile.TemporaryDirectory(prefix=".htp-", dir=output) as folder,
        rewritten_graphs(bundle) as prefix,
    ):
        fresh, done = Path(folder).absolute(), list[Compiled]()
        for group in groups:
            for graph in group[:1] if shared else group:
                on_graph(graph)
            job = {
                "do": "compile",
                "bundle": os.fspath(bundle.absolute()),
                "graphs": group,
                "output": os.fspath(fresh),
                "prefix": prefix,
                "soc": [soc.name, soc.htp_arch, soc.soc_model],
                "shared": shared,
            }
            lines = work(job, timeout=timeout)
            done += [_compiled(line, soc, fresh) for line in lines if "seconds" in line]
        for graph in graphs:
            _remove(output, graph, soc)
        for made in fresh.iterdir():
            made.replace(output / made.name)
    return done


@contextmanager
def rewritten_graphs(bundle: Path) -> Iterator[str]:
    """A prefix for files in the bundle, which are gone behind this block whatever happens in it."""
    if not os.access(bundle, os.W_OK):
        raise PotexportError(f"{bundle} is not writable; the compiler needs a place beside weights")
    prefix = f".htp-{os.getpid()}-"
    try:
        yield prefix
    finally:
        for path in bundle.glob(f"{glob.escape(prefix)}*"):
            path.unlink()


def run(
    files: Mapping[str, Path],
    inputs: Mapping[str, Mapping[str, Array]],
    *,
    timeout: float = TIMEOUT,
) -> dict[str, dict[str, Array]]:
    """Run each graph once on the emulator.

    Args:
        files: unshared contexts, by graph. inputs: of each graph, by name, as its context declares
            them.

    Returns the outputs of each graph, by name.
    Raises PotexportError if the emulator crashes or takes too long.
    """
    require()
    with tempfile.TemporaryDirectory(prefix="potexport-htp-") as folder:
        given, result = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        arrays: dict[str, Any] = {
            f"{graph}/{name}": array
            for graph, each in inputs.items()
            for name, array in each.items()
        }
        np.savez(given, **arrays)
        job = {
            "do": "run",
            "contexts": {name: os.fspath(path.absolute()) for name, path in files.items()},
            "inputs": os.fspath(given),
            "result": os.fspath(result),
        }
        work(job, timeout=timeout)
        made: dict[str, dict[str, Array]] = {graph: {} for graph in files}
        with np.load(result) as outputs:
            for key in outputs.files:
                graph, _, name = key.partition("/")
                made[graph][name] = outputs[key]
        return made


def read(
    bundle: Path,
    files: Mapping[str, Path],
    ids: Array,
    *,
    embedding: str | None,
    forced: Array | None = None,
    steps: int = 0,
    catalyst: Sequence[int] | None = None,
    timeout: float = TIMEOUT,
    on_progress: Progress = lambda *_: None,
) -> Recording:
    """Run the whole loop on the emulator: feed `ids`, then decode along `forced`, or freely.

    Args:
        files: unshared contexts, by graph; graphs without one run on the CPU.
        embedding: as in Compiled.
        catalyst: token ids; the bundle's own by default.
        timeout: seconds in which nothing happens.
        on_progress: told how many tokens were read, and of how many.

    Raises PotexportError if the emulator crashes or takes too long.
    """
    require()
    with tempfile.TemporaryDirectory(prefix="potexport-htp-") as folder:
        result = Path(folder) / "recording.npz"
        job = {
            "do": "read",
            "bundle": os.fspath(bundle.absolute()),
            "contexts": {name: os.fspath(path.absolute()) for name, path in files.items()},
            "embedding": embedding,
            "ids": [int(token) for token in ids],
            "forced": None if forced is None else [int(token) for token in forced],
            "steps": steps,
            "catalyst": None if catalyst is None else [int(token) for token in catalyst],
            "result": os.fspath(result),
        }
        work(job, timeout=timeout, on_progress=on_progress)
        return Recording.load(result)


def _compiled(line: dict[str, Any], soc: Soc, folder: Path) -> Compiled:
    path = folder / context_file(line["graph"], soc)
    files = (path, folder / f"{path.stem}_qnn.bin")
    return Compiled(
        graph=line["graph"],
        seconds=line["seconds"],
        bytes=sum(file.stat().st_size for file in files if file.exists()),
        peak_memory=line["peak_memory"],
        nodes=line["nodes"],
        rewrites=line["rewrites"],
        embedding=line["embedding"],
    )


def _remove(folder: Path, graph: str, soc: Soc) -> None:
    """Delete an older context of this graph and chip, and its binary."""
    path = folder / context_file(graph, soc)
    path.unlink(missing_ok=True)
    (folder / f"{path.stem}_qnn.bin").unlink(missing_ok=True)
