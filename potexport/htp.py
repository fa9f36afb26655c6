"""Compiling graphs for Qualcomm's HTP, and running the loop on its emulator.

The compiler and the emulator are closed libraries that can crash, hang, or die of memory; so all of
their work is done by `htp_worker` in a process of its own, and this file turns every way in which
that can end into a result or a PotexportError that names the graph. It never imports them.

Nothing of Qualcomm's is copied: contexts hold our graphs and weights, and the libraries stay in the
package onnxruntime-qnn, which each user installs.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potexport.errors import PotexportError
from potexport.recording import Recording
from potexport.runtime.backend import Array
from potexport.targets._qualcomm import Soc

TIMEOUT = 1800.0  # seconds a graph; thirty layers of SmolLM2 take a third of a minute
REFUSED_SHOWN = 8


@dataclass(frozen=True)
class Compiled:
    """What became of one graph. nodes: operator -> how many, all of them on the HTP.

    bytes: of its context; where weights are shared, the first graph's holds them all.
    rewrites: what was written differently for the HTP, and how often.
    """

    graph: str
    seconds: float
    bytes: int
    peak_memory: int
    nodes: dict[str, int]
    rewrites: dict[str, int]


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
        _rewritten_graphs(bundle) as prefix,
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
            lines = _work(job, timeout=timeout * len(group))
            done += [_compiled(line, soc, fresh) for line in lines if "seconds" in line]
        for graph in graphs:
            _remove(output, graph, soc)
        for made in fresh.iterdir():
            made.replace(output / made.name)
    return done


@contextmanager
def _rewritten_graphs(bundle: Path) -> Iterator[str]:
    """A prefix for files in the bundle, which are gone behind this block whatever happens in it."""
    if not os.access(bundle, os.W_OK):
        raise PotexportError(f"{bundle} is not writable; the compiler needs a place beside weights")
    prefix = f".htp-{os.getpid()}-"
    try:
        yield prefix
    finally:
        for path in bundle.glob(f"{glob.escape(prefix)}*"):
            path.unlink()


def read(
    bundle: Path,
    files: Mapping[str, Path],
    ids: Array,
    *,
    forced: Array,
    catalyst: Sequence[int] | None = None,
    timeout: float = TIMEOUT,
) -> Recording:
    """Run the whole loop on the emulator: feed `ids`, then decode along `forced`.

    Args:
        files: unshared contexts, by graph.
        catalyst: token ids; the bundle's own by default.

    Raises PotexportError if the emulator crashes or takes too long.
    """
    require()
    with tempfile.TemporaryDirectory(prefix="potexport-htp-") as folder:
        result = Path(folder) / "recording.npz"
        job = {
            "do": "read",
            "bundle": os.fspath(bundle.absolute()),
            "contexts": {name: os.fspath(path.absolute()) for name, path in files.items()},
            "ids": [int(token) for token in ids],
            "forced": [int(token) for token in forced],
            "catalyst": None if catalyst is None else [int(token) for token in catalyst],
            "result": os.fspath(result),
        }
        _work(job, timeout=timeout)
        return Recording.load(result)


def _work(job: dict[str, Any], *, timeout: float) -> list[dict[str, Any]]:
    """Let a worker do a job; the lines that it reported, or a PotexportError with the reason."""
    with tempfile.TemporaryDirectory(prefix="potexport-htp-") as folder:
        place = Path(folder)
        order, report, chatter = place / "job.json", place / "report.jsonl", place / "chatter.txt"
        order.write_text(json.dumps(job))
        report.touch()
        command = [sys.executable, "-m", "potexport.htp_worker", str(order), str(report)]
        with chatter.open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                code: int | None = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # an interrupt must not leave a compiler behind
                process.kill()
                process.wait()
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        _check(job, lines, code, chatter, timeout)
        return lines


def _check(
    job: dict[str, Any], lines: list[dict[str, Any]], code: int | None, log: Path, timeout: float
) -> None:
    """Raise the PotexportError that says how a worker failed, if it did."""
    if code == 0 and lines and lines[-1].get("finished"):
        return
    last = lines[-1] if lines else {}
    first = job["graphs"][0] if job["do"] == "compile" else None
    graph = next((line["graph"] for line in reversed(lines) if "graph" in line), first)
    where = f"graph {graph}" if graph else "the loop"
    what = f"compiling {where} for {job['soc'][0]}" if job["do"] == "compile" else where
    if "refused" in last:
        nodes = last["refused"]
        shown = ", ".join(f"{kind} {name}" for name, kind in nodes[:REFUSED_SHOWN])
        more = f" and {len(nodes) - REFUSED_SHOWN} more" if len(nodes) > REFUSED_SHOWN else ""
        raise PotexportError(f"the HTP refuses {len(nodes)} nodes of {where}: {shown}{more}")
    if "mistake" in last:
        raise PotexportError(last["mistake"])
    if "failed" in last:
        raise PotexportError(f"{what} failed: {last['failed']}")
    if code is None:
        raise PotexportError(f"{what} took more than {timeout:.0f} s and was stopped")
    if code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
        hint = "; was memory short?" if -code == signal.SIGKILL else ""
        raise PotexportError(f"{what} crashed the process that did it ({name}){hint}")
    tail = log.read_text(errors="replace").strip().splitlines()[-1:]
    raise PotexportError(f"{what} ended with code {code}: {' '.join(tail)[:300]}")


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
    )


def _remove(folder: Path, graph: str, soc: Soc) -> None:
    """Delete an older context of this graph and chip, and its binary."""
    path = folder / context_file(graph, soc)
    path.unlink(missing_ok=True)
    (folder / f"{path.stem}_qnn.bin").unlink(missing_ok=True)
