"""What a graph becomes on the HTP, and what its values are there: the child's side of `coverage`.

Runs in the process that may crash (`htp_worker`). A node that the HTP refuses is no error here, it
is an answer: such a graph is compiled again with the rest of it on the CPU.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from potexport.htp_worker import NO_FALLBACK, _options, _placed, _provide

Say = Callable[..., None]


def place(job: dict[str, Any], say: Say) -> bool:
    """Compile each graph and report what became of its nodes; False if one failed."""
    import onnx_ir as ir

    from potexport.lower_htp import lower

    for name in job["graphs"]:
        say(graph=name)
        model = ir.load(Path(job["bundle"], f"{name}.onnx"))
        before = Counter(node.op_type for node in model.graph)
        rewrites = lower(model).fired
        nodes = [
            (str(node.name), node.op_type, [str(value.name) for value in node.outputs])
            for node in model.graph
        ]
        with tempfile.TemporaryDirectory(prefix="potexport-qnn-") as folder:
            asked = {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": folder}
            started = perf_counter()
            session = _compiled(job, name, model, asked, say)
            if session is None:
                return False
            seconds, refused = perf_counter() - started, _placed(session, on_htp=False)
            say(
                graph=name,
                seconds=seconds,
                written=dict(before),
                rewrites=rewrites,
                refused=refused,
                **became(nodes, _dumped(Path(folder)), {node for node, _ in refused}),
            )
    return True


def tap(job: dict[str, Any], say: Say) -> bool:
    """Run one graph with more outputs, job["taps"], over the arrays in job["inputs"]; those that
    the rewritten graph has go to job["result"]. False if it failed."""
    import numpy as np
    import onnx_ir as ir

    from potexport import taps
    from potexport.lower_htp import lower
    from potexport.runtime.qnn_backend import DTYPES

    (name,) = job["graphs"]
    say(graph=name)
    model = ir.load(Path(job["bundle"], f"{name}.onnx"))
    lower(model)
    found = taps.tap(model, job["taps"])
    session = _compiled(job, name, model, {}, say)
    if session is None:
        return False
    with np.load(job["inputs"]) as given:
        feeds = {
            each.name: given[each.name].astype(DTYPES[each.type]) for each in session.get_inputs()
        }
    np.savez(job["result"], **dict(zip(found, session.run(found, feeds), strict=True)))
    return True


def _compiled(job: dict[str, Any], name: str, model: Any, asked: dict[str, str], say: Say) -> Any:
    """A session with all nodes on the HTP, or with all but those it refuses; None, after saying
    why, if there is none."""
    import onnx_ir as ir
    import onnxruntime

    _, arch, number = job["soc"]
    path = Path(job["bundle"], f"{job['prefix']}{name}.onnx")  # beside the weights, as they must be
    ir.save(model, path)
    provider = {"backend_type": "htp", "htp_arch": str(arch), "soc_model": str(number), **asked}
    failure = ""
    for strict in (True, False):
        options = _options(strict=strict)
        _provide(options, provider)
        try:
            session = onnxruntime.InferenceSession(str(path), options)
        except Exception as error:  # ONNX Runtime's exceptions have no common base but this
            failure = str(error)
            if NO_FALLBACK in failure:
                continue
            break
        if _placed(session, on_htp=True):
            return session
        failure = "the HTP takes no node of it"  # ONNX Runtime tried again on the CPU, unasked
        break
    say(graph=name, failed=failure.splitlines()[0][:300])
    return None


def _dumped(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> operator of QNN, of all the graphs that the compiler wrote down."""
    nodes: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        nodes |= json.loads(path.read_text()).get("graph", {}).get("nodes", {})
    return nodes


def became(
    nodes: Sequence[tuple[str, str, Sequence[str]]],
    dumped: Mapping[str, Mapping[str, Any]],
    refused: set[str],
) -> dict[str, Any]:
    """Match ONNX nodes with QNN's operators: by the same name, by an output that
    both make, or by how the name begins.

    Args:
        nodes: name, operator and outputs of each node as it was handed to the compiler.
        dumped: name -> QNN's operator, with "type" and "output_names".

    Returns "became": operator -> what one node became (types of QNN, joined by +) -> how many
    nodes, "" for those of which QNN has no operator of its own; "added": type -> how many of QNN's
    operators belong to no node.
    """
    by_output = {out: name for name, _, outs in nodes for out in outs}
    names = {name for name, _, _ in nodes}
    types: dict[str, list[str]] = {}
    added: Counter[str] = Counter()
    for name, made in dumped.items():
        out = next((by_output[out] for out in made["output_names"] if out in by_output), None)
        owner = (
            name
            if name in names
            else out
            or max(
                (each for each in names if each and name.startswith(each)), key=len, default=None
            )
        )
        if owner is None:
            added[made["type"]] += 1
        else:
            types.setdefault(owner, []).append(made["type"])
    result: dict[str, Counter[str]] = {}
    for name, operator, _ in nodes:
        if name not in refused:
            kind = " + ".join(sorted(types.get(name, [])))
            result.setdefault(operator, Counter())[kind] += 1
    return {"became": {name: dict(each) for name, each in result.items()}, "added": dict(added)}
