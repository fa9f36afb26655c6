"""The compression graphs, traced beside the model graphs by a process of its own.

Tracing is Python and takes one core; nothing of one graph is needed for another. The process and
its parent take graph by graph, the one from the first, the other from the last once its own are
made; who creates a graph's file `claimed` first makes it. Whatever becomes of the process, what it
did not finish is made here.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from potexport import collector
from potexport.runtime.provider import cores
from potexport.spec import GraphSpec

if TYPE_CHECKING:
    from potexport.graphs.compress import Compress

WORTH = 12  # layers; below, a process takes longer to import torch than it saves
Make = Callable[[], dict[str, ir.Model]]
Order = list[tuple[str, "Compress", GraphSpec]]


@contextmanager
def compressing(
    graphs: Mapping[str, Compress], specs: Mapping[str, GraphSpec], *, opset: int, layers: int
) -> Iterator[Make]:
    """Begin to make compression graphs; what is yielded gives all of them, by name."""
    if layers < WORTH or cores() < 2:
        yield lambda: {name: make(graphs[name], specs[name], opset) for name in graphs}
        return
    with tempfile.TemporaryDirectory(prefix="potexport-") as folder:
        place = Path(folder)
        order = [(name, graph, specs[name]) for name, graph in graphs.items()]
        (place / "order").write_bytes(pickle.dumps((order, opset)))
        process = _started(place)
        try:
            yield lambda: _gathered(place, process, order, opset)
        finally:
            process.kill()
            process.wait()


def make(graph: Compress, spec: GraphSpec, opset: int) -> ir.Model:
    from potexport import export, lower_onnx

    return lower_onnx.cut(export.compress(graph, spec, opset=opset), spec)


def _started(place: Path) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    nothing = subprocess.DEVNULL
    # -P: whatever package of our name lies where the command was given is not ours.
    command = [sys.executable, "-P", "-m", "potexport.beside", str(place)]
    return subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, stderr=nothing)


def _gathered(
    place: Path, process: subprocess.Popen[bytes], order: Order, opset: int
) -> dict[str, ir.Model]:
    mine = {
        name: make(graph, spec, opset)
        for name, graph, spec in reversed(order)
        if _claim(place, name)
    }
    if len(mine) < len(order):
        process.wait()
    made = {}
    for name, graph, spec in order:
        path = place / f"{name}.onnx"
        if name in mine:
            made[name] = mine[name]
        elif path.is_file():
            made[name] = ir.load(path)
        else:  # the process came to an end first
            made[name] = make(graph, spec, opset)
    return made


def _claim(place: Path, name: str) -> bool:
    with suppress(FileExistsError):
        (place / f"{name}.claimed").touch(exist_ok=False)
        return True
    return False


def main(place: Path) -> None:
    """Of the process."""
    order, opset = pickle.loads((place / "order").read_bytes())
    for name, graph, spec in order:
        if _claim(place, name):
            partial = place / f"{name}.partial"
            ir.save(make(graph, spec, opset), partial)
            partial.rename(place / f"{name}.onnx")


if __name__ == "__main__":
    with collector.paused():
        main(Path(sys.argv[1]))
